import pytest
import torch
import torch.nn.functional as F

from rfkernels.variants.dyflux import TokenSelect, double_block, single_block
from tests.variants.reference import close, randn, randomise

flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")
WIDTH, TOKENS, WORDS, BATCH = 16, 9, 4, 3
ANGLE = randn(WORDS + TOKENS, 4, seed=9).repeat_interleave(2, -1)
ROPE = ANGLE.cos(), ANGLE.sin()
FLOAT32 = {"rtol": 1e-6, "atol": 1e-6}  # diffusers rotates in float32


def inputs():
    sizes = ((BATCH, TOKENS, WIDTH), (BATCH, WORDS, WIDTH), (BATCH, WIDTH))
    return tuple(randn(*size, seed=seed) for seed, size in enumerate(sizes))


def double():
    return randomise(flux.FluxTransformerBlock(WIDTH, 2, 8), 1).eval()


def single():
    return randomise(flux.FluxSingleTransformerBlock(WIDTH, 2, 8), 2).eval()


def router(bias=0.0):
    made = randomise(TokenSelect(WIDTH), 3)
    made.logit.bias.fill_(bias)
    return made


def logits(r, image, text, temb):
    """From the card."""
    m = F.linear(F.silu(temb), r.modulation[1].weight, r.modulation[1].bias)[:, None].chunk(4, -1)
    norm = lambda x: F.layer_norm(x, (WIDTH,), r.norm.weight, r.norm.bias, 1e-5)
    pooled = norm(text).mean(1, keepdim=True) * (1 + m[3]) + m[2]
    return ((norm(image) * (1 + m[1]) + m[0] + pooled) @ r.logit.weight.T + r.logit.bias)[..., 0]


def test_logits_are_those_of_the_card():
    close(router(0.3)(*inputs()), logits(router(0.3), *inputs()))


@pytest.mark.parametrize("room", [None, TOKENS])
@pytest.mark.parametrize("rope", [ROPE, None])
def test_single_block_leaves_out_unselected_image_tokens(room, rope):
    image, text, temb = inputs()
    keep = logits(router(), *inputs()) > 0
    assert 0 < keep.double().mean() < 1 and len(set(keep.sum(1).tolist())) > 1
    text_whole, image_whole = single()(image, text, temb, image_rotary_emb=rope)
    text_out, image_out = single_block(single(), router(), image, text, temb, rope, room)
    torch.testing.assert_close(text_out, text_whole, **FLOAT32)
    torch.testing.assert_close(image_out, torch.where(keep[..., None], image_whole, image), **FLOAT32)
    assert torch.equal(image_out[~keep], image[~keep])


@pytest.mark.parametrize("room", [None, TOKENS])
def test_double_block_skips_the_mlp_of_unselected_image_tokens(room):
    image, text, temb = inputs()
    block, seen = double(), []
    for norm in (block.norm2, block.norm2_context):
        norm.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    block(image, text, temb, image_rotary_emb=ROPE)
    keep = logits(router(), *seen, temb) > 0  # of both streams behind the attention
    assert 0 < keep.double().mean() < 1
    block.ff.register_forward_hook(lambda _, args, out: out * keep[..., None])
    text_out, image_out = double_block(double(), router(), image, text, temb, ROPE, room)
    text_masked, image_masked = block(image, text, temb, image_rotary_emb=ROPE)
    close(text_out, text_masked)
    close(image_out, image_masked)
    assert torch.equal(image_out[~keep], seen[0][~keep])


def test_a_new_router_keeps_everything():
    image, text, temb = inputs()
    fresh = TokenSelect(WIDTH).double()
    for run, block in ((double_block, double()), (single_block, single())):
        for mine, theirs in zip(
            run(block, fresh, image, text, temb, ROPE),
            block(image, text, temb, image_rotary_emb=ROPE),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs, **FLOAT32)


def test_rows_of_a_single_block_are_those_selected():
    block, rows = single(), []
    block.proj_mlp.register_forward_hook(lambda _, args, out: rows.append(out.shape[1]))
    single_block(block, router(), *inputs(), ROPE, room=2)
    assert rows == [WORDS + 2]
    with pytest.raises(ValueError, match=r"room must be in 1 .. 13, got 14"):
        single_block(block, router(), *inputs(), ROPE, room=10)
