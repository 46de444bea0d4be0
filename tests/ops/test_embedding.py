"""What the ops of `rfkernels.ops.embedding` promise."""

import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch.profiler import ProfilerActivity, profile

from rfkernels import ops
from tests.emulator.build import load as load_emulator
from tests.ops.cases import BF16, F16, F32, F64, every_device, every_kernel

TIMES = [F64, F32, F16, BF16, torch.int64, torch.int32]


def embed(device, t, dim, scale=1.0, max_period=10000.0, shift=0.0, flip=True, dtype=F32):
    if device != "emulated":
        options = dict(scale=scale, max_period=max_period, downscale_freq_shift=shift, flip_sin_to_cos=flip)
        return ops.timestep_embedding(t.to(device), dim, dtype=dtype, **options)
    out = torch.full((*t.shape, dim), math.nan, dtype=dtype)
    freqs = ops.timestep_embedding.__globals__["_frequencies"](dim // 2, max_period, shift, t.device)
    if out.numel():
        load_emulator().timestep_embedding(out, t, freqs, scale, flip)
    return out


@every_kernel
@pytest.mark.parametrize("dim", [1, 2, 3, 64, 255, 256])
@pytest.mark.parametrize("flip, shift, period", [(True, 0.0, 10000), (False, 1.0, 10000), (True, 0.5, 100)])
@pytest.mark.parametrize("scale", [1.0, 1000.0, 0.3])
def test_timestep_embedding_is_that_of_diffusers(scale, flip, shift, period, dim, device):
    if dim // 2 == shift:
        pytest.skip("diffusers divides by zero")
    t = torch.cat([torch.linspace(0, 1, 11), torch.tensor([0.0, 1e-3, 3.5, 999.0, 1000.0]) / max(scale, 1)])
    expected = get_timestep_embedding(t, dim, flip, shift, scale, period)
    result = embed(device, t, dim, scale, period, shift, flip).cpu()
    assert (result - expected).abs().max() <= 1e-6 and torch.equal(
        result[:, 2 * (dim // 2) :], expected[:, 2 * (dim // 2) :]
    )


@every_kernel
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("times", TIMES, ids=str)
def test_times_and_results_of_every_dtype(times, dtype, device):
    t = torch.tensor([0, 1, 17, 500, 961.5, 999]).to(times)
    result = embed(device, t, 128, dtype=dtype).cpu()
    assert torch.equal(result, embed("cpu", t.float(), 128).to(dtype)) and result.dtype == dtype


@every_kernel
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (4, 1, 70)], ids=str)
def test_times_of_every_shape(shape, device):
    t = 1000 * torch.rand(shape)
    result = embed(device, t, 37).cpu()
    expected = ops.timestep_embedding_reference(t, 37)
    assert result.shape == (*shape, 37)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


@every_kernel
def test_angles_that_are_no_number_stay(device):
    result = embed(device, torch.tensor([math.nan, math.inf]), 6).cpu()
    assert result.isnan().all()


@every_device
def test_timestep_embedding_obeys_torch(device):
    t = torch.rand(3, dtype=F32, device=device)
    op, args = ops.OPS["timestep_embedding"], (8, 1.0, 1e4, 0.0, True, BF16)
    torch.library.opcheck(op.functional, (t, *args))
    torch.library.opcheck(op.out_variant, (op.empty(t, *args), t, *args))
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: ops.timestep_embedding(t, 8) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(t), ops.timestep_embedding(t, 8) * 2)


@every_device
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("dim", [8, 7])
def test_timestep_embedding_has_the_gradient_of_its_definition(dim, flip, device):
    t = torch.rand(5, device=device).requires_grad_()
    grad = torch.randn(5, dim, device=device)
    args = (dim, 3.0, 1e4, 0.0, flip)
    ours = torch.autograd.grad(ops.OPS["timestep_embedding"](t, *args, F32), t, grad)
    theirs = torch.autograd.grad(ops.timestep_embedding_reference(t, *args), t, grad)
    torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda t: ops.timestep_embedding(t, dim, scale=3.0, flip_sin_to_cos=flip),
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(torch.autograd.grad(compiled(t), t, grad), theirs)
    assert ops.timestep_embedding(t.detach(), dim).isfinite().all()  # no fake tensor was kept


def test_timestep_embedding_refuses():
    t = torch.zeros(4)
    for call, message in [
        (lambda: ops.timestep_embedding(t, 0), "dim must be at least 1, got 0"),
        (lambda: ops.timestep_embedding(t, 2, downscale_freq_shift=1.0), "downscale_freq_shift must differ"),
        (lambda: ops.timestep_embedding(t[::2], 8), "expected contiguous tensors"),
        (lambda: ops.timestep_embedding(t, 8, dtype=torch.int32), "dtype must be f64, f32, f16 or bf16"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# --- patches ---


def pack_as_flux(x):
    """`FluxPipeline._pack_latents`: [B, C, H, W] to [B, H/2 W/2, 4 C]."""
    b, c, h, w = x.shape
    x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, (h // 2) * (w // 2), c * 4)


@every_device
def test_patchify_packs_as_flux_and_unpacks_as_dit(device):
    x = torch.arange(2.0 * 3 * 4 * 6, device=device).view(2, 3, 4, 6)
    assert torch.equal(ops.patchify(x, 2), pack_as_flux(x))
    # a token of "pc" is the patch with its channels last; DiT: einsum nhwpqc -> nchpwq
    tokens = ops.patchify(x, 2, "pc")
    assert torch.equal(tokens[1, 4], x[1, :, 2:4, 2:4].permute(1, 2, 0).flatten())
    image = torch.einsum("nhwpqc->nchpwq", tokens.view(2, 2, 3, 2, 2, 3)).reshape(2, 3, 4, 6)
    assert torch.equal(ops.unpatchify(tokens, (4, 6), 2, "pc"), image)


def test_patchify_packs_as_the_pipeline_of_diffusers():
    pipeline = pytest.importorskip(
        "diffusers.pipelines.flux.pipeline_flux", exc_type=(ImportError, RuntimeError)
    )
    x = torch.randn(2, 16, 8, 12)
    packed = pipeline.FluxPipeline._pack_latents(x, 2, 16, 8, 12)
    assert torch.equal(ops.patchify(x, 2), packed)
    unpacked = pipeline.FluxPipeline._unpack_latents(packed, 64, 96, 8)
    assert torch.equal(ops.unpatchify(packed, (8, 12), 2), unpacked)


@every_device
@pytest.mark.parametrize("order", ["cp", "pc"])
@pytest.mark.parametrize(
    "size, patch",
    [((4, 6), 2), ((4, 6), (4, 3)), ((4, 6), 1), ((3, 4, 6), (1, 2, 2)), ((2, 4, 6), 2)],
    ids=str,
)
def test_patches_make_the_round_trip(size, patch, order, device):
    x = torch.randn(2, 5, *size, device=device)
    tokens = ops.patchify(x, patch, order)
    sizes = (patch,) * len(size) if isinstance(patch, int) else patch
    assert tokens.shape == (
        2,
        math.prod(n // p for n, p in zip(size, sizes, strict=True)),
        5 * math.prod(sizes),
    )
    back = ops.unpatchify(tokens, size, patch, order)
    assert torch.equal(back, x) and back.is_contiguous()
    # the first token is the first corner
    corner = x[0][(slice(None), *[slice(p) for p in sizes])]
    assert torch.equal(tokens[0, 0], (corner if order == "cp" else corner.movedim(0, -1)).flatten())


@every_device
def test_patches_have_gradients_and_compile(device):
    x = torch.randn(1, 2, 4, 4, device=device, dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.patchify(x, 2, "pc"), x)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: ops.unpatchify(ops.patchify(x, 2), (4, 4), 2), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), x)


@every_device
@pytest.mark.parametrize("order", ["cp", "pc"])
def test_patches_are_one_copy(order, device):
    x = torch.randn(1, 16, 8, 16, 16, device=device)
    tokens = ops.patchify(x, (1, 2, 2), order)
    for call in (
        lambda: ops.patchify(x, (1, 2, 2), order),
        lambda: ops.unpatchify(tokens, x.shape[2:], (1, 2, 2), order),
    ):
        with profile(activities=[ProfilerActivity.CPU]) as record:
            call()
        names = [event.name for event in record.events()]
        assert names.count("aten::copy_") == 1 and names.count("aten::contiguous") == 0


IMAGE = torch.zeros(1, 3, 4, 6)
REFUSALS = [
    (lambda: ops.patchify(IMAGE[0], 2), r"x must be \[B, C, H, W\] or \[B, C, F, H, W\], got \[3, 4, 6\]"),
    (lambda: ops.patchify(IMAGE, 4), r"patch \(4, 4\) must divide the size, got \(4, 6\)"),
    (lambda: ops.patchify(IMAGE, (1, 2, 2)), "patch must be a positive size or 2 of them"),
    (lambda: ops.patchify(IMAGE, 0), "patch must be a positive size"),
    (lambda: ops.patchify(IMAGE, 2, "chw"), "order must be cp or pc, got chw"),
    (lambda: ops.unpatchify(torch.zeros(1, 5, 12), (4, 6), 2), r"tokens must be \[B, 6, 4 C\]"),
    (lambda: ops.unpatchify(torch.zeros(1, 6, 13), (4, 6), 2), r"tokens must be .* got \[1, 6, 13\]"),
    (lambda: ops.unpatchify(torch.zeros(1, 6, 12), (4, 7), 2), "must divide the size"),
    (lambda: ops.unpatchify(torch.zeros(1, 6, 12), (4,), 2), "size must be"),
    (lambda: ops.unpatchify(torch.zeros(1, 6, 12), (4, 6), 2, "x"), "order must be cp or pc, got x"),
]


@pytest.mark.parametrize("call, message", REFUSALS, ids=range(len(REFUSALS)))
def test_refusals_of_patches(call, message):
    with pytest.raises(ValueError, match=message):
        call()
