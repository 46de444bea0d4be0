import pytest
import torch
from torch import nn

from rfkernels.variants.dit import DiTBlock, SelfAttention, compacted
from rfkernels.variants.dynamic import (
    DynamicBlock,
    WidthPlan,
    WidthRouter,
    block_macs,
    gumbel_switch,
    macs_loss,
    width_masks,
)
from tests.variants import reference
from tests.variants.reference import block, close, randn, randomise

WIDTH, HEADS, TOKENS, BATCH = 16, 4, 7, 3


def dynamic(seed=0, tokens=True):
    made = randomise(DynamicBlock(block(seed=seed), tokens), seed + 10).eval()
    if tokens:  # one hidden channel: a choice that keeps some tokens and not others
        made.tokens.net[2].weight.fill_(1.0)
        made.tokens.net[2].bias.fill_(-0.4)
    return made


def inputs():
    return randn(BATCH, TOKENS, WIDTH, seed=1), randn(BATCH, WIDTH, seed=2), randn(BATCH, WIDTH, seed=3)


# --- the block ---


def test_block_is_its_definition_with_and_without_masks():
    b, (x, c, _) = block(), inputs()
    close(b(x, c), reference.forward(b, x, c))
    heads, groups = randn(BATCH, HEADS, seed=4) > 0, randn(BATCH, 8, seed=5) > 0
    close(b(x, c, heads=heads, groups=groups), reference.forward(b, x, c, heads=heads, groups=groups))


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_sliced_attention_is_a_block_diagonal_mask(slices):
    b, x, c = block(), randn(2, 8, WIDTH, seed=1), randn(2, WIDTH, seed=2)
    token = torch.arange(8)
    for strided, group in ((False, token // (8 // slices)), (True, token % slices)):
        mask = group[:, None] == group
        close(b(x, c, slices=slices, strided=strided), reference.forward(b, x, c, mask=mask))


def test_block_of_diffusers_dit():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=4, in_channels=4, num_layers=1, sample_size=4, patch_size=2
    )
    theirs = randomise(model.transformer_blocks[0], 1).eval()
    x, t, y = randn(2, 4, 16), torch.tensor([3, 700]), torch.tensor([1, 5])
    c = theirs.norm1.emb(t, y, hidden_dtype=x.dtype)
    mine = DiTBlock.from_diffusers(theirs)
    assert mine.eps == (1e-6, 1e-5)
    torch.testing.assert_close(
        mine(x, c), theirs(x, timestep=t, class_labels=y), rtol=1e-6, atol=1e-6
    )  # diffusers embeds the time in float32


# --- width ---


def test_routers_see_time_alone_and_keep_the_first():
    d = dynamic()
    heads, groups = d.masks(randn(40, WIDTH, seed=6))
    assert heads[:, 0].all() and groups[:, 0].all()
    logits = torch.nn.functional.linear(randn(40, WIDTH, seed=6), d.width.attn.weight, d.width.attn.bias)
    assert torch.equal(heads[:, 1:], logits.sigmoid() > 0.5)
    assert 0 < heads[:, 1:].double().mean() < 1 and not torch.equal(heads, groups)


def test_everything_is_on_at_the_start():
    d = DynamicBlock(DiTBlock(WIDTH, HEADS, 32)).double().eval()
    x, c, e = inputs()
    assert width_masks([d], e).all() and (d.tokens(x) > 0).all()
    y, macs = d(x, c, e)
    close(y, d.block(x, c))
    assert torch.equal(macs, torch.full_like(macs, block_macs(d.block, TOKENS, HEADS, 1.0, TOKENS)))


def test_forward_is_the_masked_definition():
    d, (x, c, e) = dynamic(), inputs()
    heads, groups = d.masks(e)
    m = d.block.modulation(c)
    keep = d.tokens(d.block.attend(x, m, heads=heads)) > 0
    assert 0 < keep.double().mean() < 1
    y, macs = d(x, c, e)
    close(y, reference.forward(d.block, x, c, heads=heads, groups=groups, keep=keep))
    for i in range(BATCH):
        h, g, n = int(heads[i].sum()), int(groups[i].sum()), int(keep[i].sum())
        projections = 4 * TOKENS * WIDTH * h * 4 + 2 * TOKENS**2 * h * 4
        assert macs[i].item() == pytest.approx(projections + 2 * n * WIDTH * 8 * g + 6 * WIDTH**2)


@pytest.mark.parametrize("heads", [[1, 0, 0, 0], [1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1]])
def test_compacted_blocks_do_what_masks_do_with_less(heads):
    b, (x, c, _) = block(), inputs()
    heads, groups = torch.tensor(heads).bool(), torch.tensor([1, 0, 1, 1]).bool()
    small = compacted(b, heads, groups)
    close(small(x, c), reference.forward(b, x, c, heads=heads, groups=groups))
    kept = int(heads.sum())
    assert small.attn.qkv.weight.shape == (3 * kept * 4, WIDTH) and small.attn.head_dim == 4
    assert small.attn.proj.weight.shape == (WIDTH, kept * 4) and small.mlp.fc2.weight.shape == (WIDTH, 24)
    assert small.adaLN_modulation[1].weight.data_ptr() == b.adaLN_modulation[1].weight.data_ptr()
    assert small.attn.qkv.weight.data_ptr() != b.attn.qkv.weight.data_ptr()


def test_a_plan_runs_every_step_of_a_schedule_as_its_masks():
    blocks, (x, c, _) = [dynamic(seed) for seed in range(3)], inputs()
    steps = randn(5, WIDTH, seed=7)[torch.tensor([0, 1, 1, 2, 3, 0, 4])]
    masks = width_masks(blocks, steps)
    assert masks.shape == (7, 3, 2, HEADS)
    plan = WidthPlan(blocks, masks)
    assert plan.group[1] == plan.group[2] and plan.group[0] == plan.group[5] and len(set(plan.group)) == 5
    assert plan.blocks(1) is plan.blocks(2)
    for step, e in enumerate(steps):
        y = z = x
        for d, small in zip(blocks, plan.blocks(step), strict=True):
            y = d(y, c, e.expand(BATCH, WIDTH))[0]
            z = d.skip(z, c, small)
        close(z, y)


def test_a_plan_makes_each_mask_of_a_layer_once_and_whole_blocks_never():
    blocks = [dynamic(0), dynamic(1)]
    masks = torch.ones(4, 2, 2, HEADS, dtype=torch.bool)
    masks[1:, 0, 0, 2] = False
    masks[2:, 1, 1, 3] = False
    plan = WidthPlan(blocks, masks)
    assert plan.group == [0, 1, 2, 2] and len(plan.made) == 2
    assert plan.blocks(0)[0] is blocks[0].block and plan.blocks(1)[1] is blocks[1].block
    assert plan.blocks(1)[0] is plan.blocks(2)[0]


# --- tokens ---


@pytest.mark.parametrize("room", [None, TOKENS])
def test_skipping_tokens_is_masking_them(room):
    d, (x, c, _) = dynamic(), inputs()
    after = d.block.attend(x, d.block.modulation(c))
    keep = d.tokens(after) > 0
    y = d.skip(x, c, room=room)
    close(y, reference.forward(d.block, x, c, keep=keep))
    assert torch.equal(y[~keep], after[~keep])
    rows = []
    d.block.mlp.register_forward_hook(lambda _, args, out: rows.append(out.shape[1]))
    d.skip(x, c, room=room)
    assert rows == [room or int(keep.sum(1).max())]


def test_a_small_room_keeps_the_best_tokens():
    d, (x, c, _) = dynamic(), inputs()
    after = d.block.attend(x, d.block.modulation(c))
    logits = d.tokens(after)
    keep = logits > 0
    room = int(keep.sum(1).max()) - 1
    best = torch.stack([row >= row.sort(descending=True).values[room - 1] for row in logits])
    assert (keep & ~best).any()
    close(d.skip(x, c, room=room), reference.forward(d.block, x, c, keep=keep & best))


def test_a_fixed_room_never_looks_at_the_numbers():
    """Tensors without data: anything that waited for the device would fail here."""
    with torch.device("meta"):
        d, x, c = DynamicBlock(DiTBlock(WIDTH, HEADS, 32)), torch.empty(2, 7, WIDTH), torch.empty(2, WIDTH)
    assert d.skip(x, c, room=4).shape == x.shape
    with pytest.raises((RuntimeError, NotImplementedError)):
        d.skip(x, c)


def test_no_token_and_every_token():
    d, (x, c, _) = dynamic(), inputs()
    d.tokens.net[2].weight.zero_()
    d.tokens.net[2].bias.fill_(-1)
    assert torch.equal(d.skip(x, c), d.block.attend(x, d.block.modulation(c)))
    d.tokens.net[2].bias.fill_(1)
    close(d.skip(x, c), d.block(x, c))
    close(dynamic(tokens=False).skip(x, c), dynamic(tokens=False).block(x, c))


# --- training ---


def test_switches_are_hard_with_the_gradient_of_a_sigmoid():
    logits = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64).repeat(20000, 1).requires_grad_()
    on = gumbel_switch(logits, 5.0, torch.Generator().manual_seed(0))
    assert set(on.unique().tolist()) == {0.0, 1.0}
    chance = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64).sigmoid()  # of a logistic variable
    torch.testing.assert_close(on.detach().mean(0), chance, rtol=0, atol=0.02)
    on.sum().backward()
    u = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    soft = ((logits.detach() + u.log() - (1 - u).log()) / 5).sigmoid()
    close(logits.grad, soft * (1 - soft) / 5)


def test_macs_are_those_of_dit_xl():
    with torch.device("meta"):
        b = DiTBlock(1152, 16)
    assert 28 * block_macs(b, 256, 16, 1.0, 256) == pytest.approx(118.69e9, rel=3e-3)


def test_training_moves_the_macs_to_their_target():
    torch.manual_seed(0)
    blocks = [DynamicBlock(block(seed=i)).double().train() for i in range(2)]
    for d in blocks:
        for layer in (d.width.attn, d.width.mlp, d.tokens.net[2]):
            nn.init.constant_(layer.bias, 4.0)  # not 15 and 35: fewer steps
    routers = [p for d in blocks for r in (d.width, d.tokens) for p in r.parameters()]
    generator = torch.Generator().manual_seed(0)
    x, c, e = inputs()

    def share(train):
        y, macs = x, []
        for d in blocks:
            y, used = d.train(train)(y, c, e, generator=generator)
            macs.append(used)
        return macs, macs_loss(blocks, macs, TOKENS, 0.6)

    first = share(False)[1].item()
    assert first == pytest.approx(0.4**2, abs=0.02)
    for _ in range(40):
        for p, slope in zip(routers, torch.autograd.grad(share(True)[1], routers), strict=True):
            p.data -= 0.2 * slope.sign()
    assert share(False)[1] < first / 4


# --- refusals ---


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: WidthRouter(8, 1), "2 heads or more required, got 1"),
        (lambda: SelfAttention(10, 4), "heads must divide the width, got 4, 10"),
        (lambda: block()(randn(1, 3, 16), randn(1, 16), heads=torch.ones(3)), r"mask \[4\] or \[batch, 4\]"),
        (lambda: compacted(block(), torch.ones(4), torch.ones(4).bool()), r"heads must be bool\[4\]"),
        (lambda: compacted(block(), torch.zeros(4).bool(), torch.ones(4).bool()), "with one kept, got"),
        (lambda: compacted(block(), torch.ones(4).bool(), torch.ones(5).bool()), r"G dividing 32"),
        (lambda: WidthPlan([dynamic()], torch.ones(2, 2, 2, 4).bool()), r"bool\[steps, 1, 2, heads\], got"),
        (lambda: macs_loss([dynamic()], [randn(2)], 7, 0.0), r"target in \(0, 1\]"),
        (lambda: dynamic().skip(*inputs()[:2], room=8), "room must be in 1 .. 7, got 8"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
