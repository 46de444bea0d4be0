"""Gradients of attention, blocks of queries at a time, against autograd of the definition."""

import pytest
import torch
import torch.nn.functional as F

from rfkernels import ops
from rfkernels.ops import _attention_gradient
from rfkernels.ops.attention import attention_reference
from tests.ops.attention_cases import simple
from tests.ops.cases import BF16, F16, F32, F64, every_device


@pytest.fixture(params=[1 << 22, 200], ids=["one block", "many blocks"])
def block(request, monkeypatch):
    """How many scores the gradient has at once."""
    monkeypatch.setattr(_attention_gradient, "_MOST_SCORES", request.param)


def leaves(*shapes, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=F64).to(device).requires_grad_() for s in shapes]


# q, k, v of (2, 4, 5, 3) beside two heads of seven keys, and what else a call has
PLAIN = ((2, 4, 5, 3), (2, 2, 7, 3), (2, 2, 7, 3))
CALLS = {
    "plain": (PLAIN, {}),
    "scale": (PLAIN, {"scale": -0.3}),
    "key lengths": (PLAIN, {"key_lengths": torch.tensor([7, 3])}),
    "nothing seen": (PLAIN, {"key_lengths": torch.tensor([0, 7])}),
    "head shift": (PLAIN, {"head_shift": torch.tensor([1, -1]), "frames": 2}),
    "head shift, key lengths": (
        PLAIN,
        {"head_shift": torch.tensor([1, -1]), "frames": 2, "key_lengths": torch.tensor([2, 6])},
    ),
    "block mask": (
        ((1, 2, 130, 2), (1, 1, 70, 2), (1, 1, 70, 2)),
        {"block_mask": torch.tensor([[[[1, 0], [0, 1]], [[0, 0], [1, 1]]]]).bool()},
    ),
    "bool bias": (PLAIN, {"bias": torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.4}),
    "blhd": (((2, 5, 4, 3), (2, 7, 2, 3), (2, 7, 2, 3)), {"layout": "blhd"}),
    "packed": (
        ((9, 4, 3), (9, 2, 3), (9, 2, 3)),
        {"cu_seqlens": torch.tensor([0, 4, 4, 9])},
    ),
    "packed, crossed": (
        ((9, 4, 3), (6, 2, 3), (6, 2, 3)),
        {"cu_seqlens": (torch.tensor([0, 4, 5, 5, 9]), torch.tensor([0, 3, 3, 4, 6]))},
    ),
}


def finite_lse(results):
    """A query that sees nothing has a constant result; gradcheck wants a finite one."""
    out, lse = results
    return out, lse.masked_fill(lse == -torch.inf, 0)


def moved(options, device):
    move = lambda t: t.to(device) if isinstance(t, torch.Tensor) else t
    return {k: tuple(map(move, v)) if isinstance(v, tuple) else move(v) for k, v in options.items()}


@every_device
@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name, device, block):
    shapes, options = CALLS[name]
    options = moved(options, device)

    def f(q, k, v):
        return finite_lse(ops.attention(q, k, v, return_lse=True, **options))

    assert torch.autograd.gradcheck(f, leaves(*shapes, device=device), fast_mode=name != "plain")


@every_device
@pytest.mark.parametrize(
    "bias", [(2, 4, 5, 7), (1, 4, 5, 7), (2, 1, 5, 7), (2, 4, 1, 7), (1, 1, 1, 7)], ids=str
)
@pytest.mark.parametrize("heads", [1, 4])
def test_gradcheck_of_bias_and_factor(bias, heads, device, block):
    tensors = leaves(*PLAIN, bias, (heads, 11), device=device)

    def f(q, k, v, bias, factor):
        return ops.attention(q, k, v, bias=bias, factor=factor, scale=0.7, return_lse=True)

    assert torch.autograd.gradcheck(f, tensors, fast_mode=True)
    for used in range(2):  # one of the two results alone
        assert torch.autograd.gradcheck(lambda *t, used=used: f(*t)[used], tensors, fast_mode=True)


@every_device
def test_gradcheck_of_all_at_once(device, block):
    tensors = leaves(*PLAIN, (1, 4, 5, 7), (4, 11), device=device)
    lengths = torch.tensor([7, 4], device=device)
    options = {"key_lengths": lengths, "head_shift": torch.tensor([-1, 1], device=device), "frames": 2}

    def f(q, k, v, bias, factor):
        return ops.attention(q, k, v, bias=bias, factor=factor, return_lse=True, **options)

    assert torch.autograd.gradcheck(f, tensors, fast_mode=True)


@every_device
def test_only_what_is_wanted_has_a_gradient(device):
    tensors = leaves(*PLAIN, (1, 4, 5, 7), (4, 11), device=device)
    all_of_them = torch.autograd.grad(_loss(*tensors), tensors)
    for i, expected in enumerate(all_of_them):
        some = [t.detach().requires_grad_(i == n) for n, t in enumerate(tensors)]
        (grad,) = torch.autograd.grad(_loss(*some), [some[i]])
        assert torch.equal(grad, expected) and grad.shape == tensors[i].shape


def _loss(q, k, v, bias, factor):
    out, lse = ops.attention(q, k, v, bias=bias, factor=factor, return_lse=True)
    return (
        out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    ).sum() + lse.square().sum()


@every_device
def test_the_gradients_are_those_of_the_definition(device, block):
    shapes = (3, 6, 40, 16), (3, 2, 50, 16), (3, 2, 50, 16), (1, 6, 40, 50), (6, 89)
    tensors = leaves(*shapes, device=device)
    lengths = torch.tensor([50, 1, 33], device=device)
    shift = torch.tensor([1, -1], device=device)
    q, k, v, bias, factor = tensors
    ours = ops.attention(
        *(q, k, v), bias=bias, factor=factor, key_lengths=lengths, head_shift=shift, frames=3, return_lse=True
    )
    theirs = attention_reference(
        *(q, k, v, bias, factor, lengths, None, None, None, shift, None, 0.25, 3, "full")
    )
    grads = [torch.randn_like(t) for t in theirs]
    for mine, other in zip(
        torch.autograd.grad(ours, tensors, grads), torch.autograd.grad(theirs, tensors, grads), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@every_device
def test_rows_that_see_nothing_have_no_gradient(device):
    q, k, v = leaves((1, 1, 4, 3), (1, 1, 5, 3), (1, 1, 5, 3), device=device)
    bias = torch.zeros(1, 1, 4, 5, dtype=F64, device=device)
    bias[..., 2, :] = -torch.inf
    bias[..., :, 4] = -torch.inf
    out, lse = ops.attention(q, k, v, bias=bias.requires_grad_(), return_lse=True)
    loss = out.square().sum() + lse.masked_fill(lse == -torch.inf, 0).sum()
    dq, dk, dv, dbias = torch.autograd.grad(loss, (q, k, v, bias))
    for grad in (dq, dk, dv, dbias):
        assert grad.isfinite().all() and (grad != 0).any()
    assert (dq[..., 2, :] == 0).all() and (dbias[..., 2, :] == 0).all()
    assert (dk[..., 4, :] == 0).all() and (dv[..., 4, :] == 0).all() and (dbias[..., 4] == 0).all()


@every_device
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_gradients_beside_those_of_torch(dtype, device):
    call = simple((2, 4, 2, 130, 200, 64), dtype, device)
    weight = torch.linspace(-2, 2, 2 * 4 * 130 * 64, dtype=F64, device=device).sin().view(2, 4, 130, 64)

    def gradients(f, dtype):
        tensors = [getattr(call, n).detach().to(dtype).requires_grad_() for n in "qkv"]
        return torch.autograd.grad(f(*tensors), tensors, weight.to(call.q.dtype).to(dtype))

    theirs_f = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    exact = gradients(theirs_f, F64)
    ours, theirs = gradients(ops.attention, dtype), gradients(theirs_f, dtype)
    for name, mine, other, right in zip("qkv", ours, theirs, exact, strict=True):
        error, allowed = (mine.double() - right).abs(), (other.double() - right).abs()
        half_step = max(torch.finfo(dtype).eps / 2, 1e-6) * right.abs().max()
        assert mine.dtype == dtype and error.max() <= 2 * allowed.max() + half_step, name
        assert error.mean() <= 1.5 * allowed.mean() + 0.05 * half_step, name


@every_device
@pytest.mark.parametrize("precision", ["int8", "fp8", "auto"])
def test_eight_bits_have_the_gradient_of_full_precision(precision, device):
    call = simple((2, 4, 2, 130, 200, 64), F32, device)
    weight = torch.randn(2, 4, 130, 64, device=device)

    def gradients(precision):
        tensors = [getattr(call, n).detach().requires_grad_() for n in "qkv"]
        out, lse = ops.attention(*tensors, precision=precision, return_lse=True)
        return torch.autograd.grad((out, lse), tensors, (weight, 0.1 * weight[..., 0]))

    for mine, right in zip(gradients(precision), gradients("full"), strict=True):
        off = (mine - right).norm() / right.norm()
        assert 0 < off < 0.03


@every_device
def test_the_mean_of_the_keys_has_no_gradient(device):
    q, k, v = (
        t.float().detach().requires_grad_() for t in leaves((1, 1, 9, 8), *[(1, 1, 5, 8)] * 2, device=device)
    )
    mean = ops.key_mean(k).detach().requires_grad_()
    out = ops.attention(q, k, v, key_mean=mean, precision="int8")
    *used, unused = torch.autograd.grad(out.sum(), (q, k, v, mean), allow_unused=True)
    assert unused is None and all(g.isfinite().all() for g in used)


@every_device
def test_the_fused_projection_gets_its_gradient(device):
    fused = torch.randn(2, 7, 3 * 2 * 8, dtype=F64, device=device, requires_grad=True)
    split = lambda t: (part.unflatten(-1, (2, 8)) for part in t.chunk(3, -1))
    weight = torch.randn(2, 7, 2, 8, dtype=F64, device=device)
    (mine,) = torch.autograd.grad(ops.attention(*split(fused), layout="blhd"), fused, weight)
    q, k, v = (t.transpose(1, 2) for t in split(fused))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(mine, torch.autograd.grad(out, fused, weight)[0])
    expanded = ops.attention(*split(fused), layout="blhd").sum()  # a gradient with strides of 0
    assert torch.autograd.grad(expanded, fused)[0].isfinite().all()
