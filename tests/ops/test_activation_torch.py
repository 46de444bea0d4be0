"""Activations as torch sees them: gradients, compilation, what is refused."""

import itertools

import pytest
import torch

from rfkernels import ops
from tests.ops.cases import BF16, F32, F64, every_device, every_kernel
from tests.ops.test_activation import TOLERANCE, every_kind, every_type, gated_args, randn, run, widen

# --- gradients ---


@every_device
@every_kind
def test_gradients_pass_gradcheck(kind, device):
    x = randn(2, 3, 6, dtype=F64, device=device).requires_grad_()
    up = randn(2, 3, 6, dtype=F64, device=device, seed=1).requires_grad_()
    b, c = (randn(6, dtype=F64, device=device, seed=i).requires_grad_() for i in (2, 3))
    check = torch.autograd.gradcheck
    assert check(lambda x, b: ops.activation(x, kind, bias=b), (x, b))
    assert check(lambda *a: ops.gated_activation(a[0], kind, up=a[1], bias=a[2:]), (x, up, b, c))
    for first in (True, False):
        assert check(lambda x, b, f=first: ops.gated_activation(x, kind, bias=b, gate_first=f), (x, b))


@every_kernel
@every_kind
@every_type
def test_backward_kernels_match_the_gradients_of_torch(types, kind, device):
    shape = (3, 300)
    grad = randn(*shape, dtype=types[0], device=device, seed=7)
    x = randn(*shape, dtype=types[0], device=device)
    bias = randn(300, dtype=types[1], device=device) if types[1] else None
    dx = run(device, "activation_backward", x, grad, x, bias, kind)
    reference = ops.OPS["activation_backward"].reference
    tolerance = 4 * TOLERANCE[types[0]]
    torch.testing.assert_close(
        dx.double(), reference(*widen(grad, x, bias), kind), rtol=tolerance, atol=tolerance
    )
    reference = ops.OPS["gated_activation_backward"].reference
    for packed, first in itertools.product((True, False), (True, False)):
        args = gated_args(shape, types, packed, device)
        out = torch.empty(3, 600, dtype=types[0], device=x.device)
        dx = run(device, "gated_activation_backward", out, grad, *args, kind, first)
        expected = reference(*widen(grad, *args), kind, first)
        torch.testing.assert_close(dx.double(), expected, rtol=tolerance, atol=tolerance)


@every_device
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
def test_gradients_keep_dtypes(dtypes, device):
    x, _, bias, _ = gated_args((64, 40), dtypes, True, device)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    dx, db = torch.autograd.grad(ops.gated_activation(x, "silu", bias=bias).sum(), (x, bias))
    assert dx.dtype == x.dtype and db.dtype == bias.dtype and dx.shape == x.shape and db.shape == bias.shape
    wide = [t.detach().double().requires_grad_() for t in (x, bias)]
    expected = torch.autograd.grad(ops.gated_activation(wide[0], "silu", bias=wide[1]).sum(), wide)
    torch.testing.assert_close(db.double(), expected[1], rtol=2e-2, atol=5e-2)


@every_device
def test_gradients_do_not_write_over_what_is_saved(device):
    x = randn(4, 16, dtype=F32, device=device).requires_grad_()
    y = ops.gated_activation(x, "silu")
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- torch ---


@every_device
@pytest.mark.parametrize("grad", [False, True])
def test_ops_obey_torch(grad, device):
    x, _, bias, _ = gated_args((2, 5), (F64, F64), True, device)
    gate, up = (t.clone().requires_grad_(grad) for t in x.chunk(2, -1))
    x, bias = x.requires_grad_(grad), bias.requires_grad_(grad)
    calls = {
        "activation": [(x, bias, "gelu", "fast"), (x, None, "silu", "exact")],
        "gated_activation": [
            (x, None, bias, None, "gelu", False, "fast"),
            (gate, up, None, None, "silu", True, "fast"),
        ],
        "activation_backward": [(x.detach(), x.detach(), None, "silu")],
        "gated_activation_backward": [(gate.detach(), x.detach(), None, None, None, "silu", True)],
    }
    for name, arguments in calls.items():
        for args in arguments:
            torch.library.opcheck(ops.OPS[name].functional, args)
            if not grad:
                torch.library.opcheck(ops.OPS[name].out_variant, (ops.OPS[name].empty(*args), *args))


@every_device
def test_ops_compile_without_graph_breaks(device):
    x, _, bias, _ = gated_args((2, 8), (F32, F32), True, device)
    torch._dynamo.reset()

    def function(x, bias):
        return ops.activation(ops.gated_activation(x, "silu", bias=bias), "gelu_tanh") * 2

    x, bias = x.requires_grad_(), bias.requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, bias), function(x, bias))
    ours = torch.autograd.grad(compiled(x, bias).sum(), (x, bias))
    torch.testing.assert_close(ours, torch.autograd.grad(function(x, bias).sum(), (x, bias)))


# --- refusals ---

X = torch.zeros(2, 6)
REFUSALS = [
    (lambda: ops.activation(X, "tanh"), "kind must be gelu, gelu_tanh, silu or relu2, got tanh"),
    (
        lambda: ops.activation(X, "silu", tier="exact_before_weight"),
        "tier must be fast or exact, got exact_b",
    ),
    (lambda: ops.activation(X[0, 0], "silu"), r"x must be \[\*lead, width\], got f32\[\]"),
    (lambda: ops.activation(X.T, "silu"), "x must have no gaps along its last axis"),
    (lambda: ops.activation(X.int(), "silu"), "x must be f64, f32, f16 or bf16, got i32"),
    (lambda: ops.activation(X, "silu", bias=X[0, :5]), r"bias must be \[6\] .* got f32\[5\]"),
    (lambda: ops.activation(X, "silu", bias=X[0].double()), r"bias must be .* got f64\[6\]"),
    (lambda: ops.activation(X, "silu", bias=X[0].half()), r"bias must be .* got f16\[6\]"),
    (lambda: ops.activation(X.half(), "silu", bias=X[0].bfloat16()), r"bias must be .* got bf16\[6\]"),
    (lambda: ops.activation(X, "silu", bias=torch.zeros(12)[::2]), r"bias must be \[6\] without gaps"),
    (lambda: ops.activation(X, "silu", bias=X[:1]), r"bias must be .* got f32\[1, 6\]"),
    (lambda: ops.activation(X, "silu", out=torch.zeros(2, 5)), r"out must be like x f32\[2, 6\]"),
    (lambda: ops.activation(X, "silu", out=torch.zeros(2, 6).double()), "out must be like x"),
    (
        lambda: ops.activation(X[:, :5], "silu", out=X[:, 1:]),
        "out must be one of the inputs or share no memory",
    ),
    (lambda: ops.activation(X, "silu", out=X.view(3, 4).T.reshape(4, 3)[:2, :6]), "out must be like x"),
    (lambda: ops.gated_activation(X[:, :5], "silu"), r"x must hold two halves .* got f32\[2, 5\]"),
    (
        lambda: ops.gated_activation(X, "silu", up=X[:, :5]),
        r"up must be like x f32\[2, 6\] cpu, got f32\[2, 5\]",
    ),
    (lambda: ops.gated_activation(X, "silu", up=X.half()), "up must be like x"),
    (lambda: ops.gated_activation(X, "silu", bias=X[0, :3]), r"bias must be \[6\]"),
    (lambda: ops.gated_activation(X, "silu", bias=(X[0], X[0])), "bias must be one tensor"),
    (lambda: ops.gated_activation(X, "silu", up=X, bias=X[0]), "bias must be a tuple"),
    (lambda: ops.gated_activation(X, "silu", up=X, bias=(None, X[0, :3])), "the bias of up must be"),
    (lambda: ops.gated_activation(X, "silu", out=torch.zeros(2, 6)), "out must be like one half"),
    (lambda: ops.gated_activation(X, "silu", out=X[:, 1:4]), "share no memory"),
    (
        lambda: ops.OPS["gated_activation"](X, None, None, X[0], "silu", True, "fast"),
        "one bias of both halves",
    ),
    (lambda: ops.OPS["activation_backward"](X[:, :5], X, None, "silu"), "grad must be like x"),
    (
        lambda: ops.OPS["gated_activation_backward"](X, X, None, None, None, "silu", True),
        "grad must be like one half",
    ),
    (lambda: ops.gelu(X, "erf"), "approximate must be none or tanh, got erf"),
]


@pytest.mark.parametrize("call, message", REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_out_has_no_gradient():
    x = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="out= has no gradient"):
        ops.activation(x, "silu", out=torch.zeros(2, 6))
