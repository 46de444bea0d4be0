"""The rope room against the code of models: diffusers' position embedding, norms and rotation."""

import pytest
import torch

from rfkernels import ops
from tests.ops.cases import BF16, F16, F32, F64, every_kernel
from tests.ops.rope_calls import Make, run


def image_ids(text: int, height: int, width: int) -> torch.Tensor:
    """FLUX's ids: zeros for the text, then (0, row, column) of every patch."""
    ids = torch.zeros(text + height * width, 3)
    ids[text:, 1] = torch.arange(height).repeat_interleave(width)
    ids[text:, 2] = torch.arange(width).repeat(height)
    return ids


@pytest.mark.parametrize("theta, axes_dims", [(10000, (16, 56, 56)), (256, (32, 48, 48))])
def test_table_is_that_of_flux(theta, axes_dims):
    pytest.importorskip("diffusers")
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    ids = image_ids(5, 12, 9)
    cos, sin = FluxPosEmbed(theta, list(axes_dims))(ids)
    table = ops.rotary_table(ids, axes_dims, theta)
    assert table.shape == (113, 64, 2) and table.dtype == F32
    assert torch.equal(table[..., 0], cos[:, ::2]) and torch.equal(table[..., 1], sin[:, 1::2])


def test_table_takes_ids_of_samples_and_of_any_dtype():
    ids = torch.randint(-40, 40, (2, 7, 2))
    table = ops.rotary_table(ids, (4, 10), dtype=F64)
    assert table.shape == (2, 7, 7, 2) and table.dtype == F64
    for b in range(2):
        assert torch.equal(ops.rotary_table(ids[b].float(), (4, 10), dtype=F64), table[b])
    angle = ids[1, 3, 1] * 10000 ** (-2 * 2 / 10)  # axis 1, pair 2
    torch.testing.assert_close(table[1, 3, 2 + 2], torch.stack([angle.cos(), angle.sin()]).double())


@pytest.mark.parametrize(
    "ids, axes_dims, message",
    [
        (
            torch.zeros(5, 2),
            (4, 4, 4),
            r"ids must be \[\*lead, tokens, 3\] for axes_dims \(4, 4, 4\), got \[5, 2\]",
        ),
        (torch.zeros(3), (4, 4, 4), r"ids must be .* got \[3\]"),
        (torch.zeros(5, 2), (4, 3), r"axes_dims must be even and positive, got \(4, 3\)"),
        (torch.zeros(5, 2), (4, 0), r"axes_dims must be even and positive, got \(4, 0\)"),
    ],
)
def test_table_refuses_what_does_not_fit(ids, axes_dims, message):
    with pytest.raises(ValueError, match=message):
        ops.rotary_table(ids, axes_dims)


def norms(tier: str, d: int, dtype: torch.dtype, make: Make):
    from diffusers.models.normalization import RMSNorm

    made = []
    for _ in range(4):
        norm = torch.nn.RMSNorm(d, 1e-6) if tier == "exact" else RMSNorm(d, 1e-6)
        norm.weight.data = make.weight(d, dtype)
        made.append(norm)
    return made


@every_kernel
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("tier", ["exact", "exact_before_weight"])
def test_exact_is_the_double_block_of_diffusers(tier, dtype, layout, device):
    # FluxAttnProcessor: norms of both streams, text first, then the rotation of all tokens. All but one in a
    # thousand to the bit, those by one unit: the sum of squares has another order.
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    heads, d, text, make = 3, 128, 8, Make(dtype, device)
    image, prompt = make.normal(2, 63, 3 * heads * d), make.normal(2, text, 3 * heads * d)
    ids = image_ids(text, 9, 7)
    rotary = FluxPosEmbed(10000, [16, 56, 56])(ids)
    norm_q, norm_k, norm_added_q, norm_added_k = norms(tier, d, dtype, make)
    with torch.no_grad():
        q, k, v = (t.unflatten(-1, (heads, d)).cpu() for t in image.chunk(3, -1))
        tq, tk, tv = (t.unflatten(-1, (heads, d)).cpu() for t in prompt.chunk(3, -1))
        q = torch.cat([norm_added_q.cpu()(tq), norm_q.cpu()(q)], 1)
        k = torch.cat([norm_added_k.cpu()(tk), norm_k.cpu()(k)], 1)
        theirs = [apply_rotary_emb(t, rotary, sequence_dim=1) for t in (q, k)] + [torch.cat([tv, v], 1)]
    place = lambda t: t.detach().to(image.device)
    ours = run(
        device,
        [prompt, image],
        heads,
        q_weight=[place(norm_added_q.weight), place(norm_q.weight)],
        k_weight=[place(norm_added_k.weight), place(norm_k.weight)],
        rotation=place(ops.rotary_table(ids, (16, 56, 56))),
        layout=layout,
        tier=tier,
    )
    for mine, other in zip(ours, theirs, strict=True):
        mine = (mine.transpose(1, 2) if layout == "bhld" else mine).cpu().contiguous()
        assert (mine != other).double().mean() <= 1e-3
        other = other.contiguous()
        steps = (mine.view(torch.int16).int() - other.view(torch.int16).int()).abs()
        small = other.float().abs() < 2e-2  # a difference of products may lose more bits
        assert steps[~small].max() <= 2
    assert torch.equal(ours[2].cpu(), (theirs[2].transpose(1, 2) if layout == "bhld" else theirs[2]))
