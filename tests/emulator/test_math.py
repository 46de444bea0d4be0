"""The functions of core/math.h and core/activation.h against float64."""

import math

import pytest
import torch

INF, NAN = math.inf, math.nan
# the range, and what is allowed of the value there
FUNCTIONS = {
    "exp": (torch.exp, (-87.0, 88.7), 1.2e-7),
    "tanh": (torch.tanh, (-1e3, 1e3), 2.5e-7),
    "sigmoid": (torch.sigmoid, (-87.0, 1e3), 2.5e-7),
    "cdf": (lambda x: 0.5 * torch.special.erfc(-x / 2**0.5), (-12.8, 1e3), 1e-6),
    "log": (torch.log, (2.0**-126, 3e38), 1.5e-7),
    "density": (lambda x: torch.exp(-x * x / 2) / math.tau**0.5, (-13.0, 13.0), 3e-7),
}


def apply(emulated, function, x):
    y = torch.full_like(x, NAN)
    emulated.test.math(y, x, function)
    return y


def grid(low, high):
    """Evenly spaced numbers, numbers of every size, and all 16-bit numbers, within the range."""
    sizes = 2.0 ** torch.linspace(-126, 10, 20_001, dtype=torch.float64)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = [bits.view(torch.bfloat16).double(), bits.view(torch.float16).double()]
    x = torch.cat([torch.linspace(low, high, 50_001, dtype=torch.float64), sizes, -sizes, *every]).float()
    return x[(x >= low) & (x <= high)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float_function_is_accurate_to_a_few_units_of_its_value(emulated, name):
    reference, (low, high), tolerance = FUNCTIONS[name]
    x = grid(low, high)
    expected = reference(x.double())
    error = (apply(emulated, name, x).double() - expected).abs() / expected.abs().clamp(min=1e-44)
    normal = expected.abs() > 2**-126  # subnormal values keep fewer bits
    assert error[normal].max() <= tolerance, x[normal][error[normal].argmax()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_double_function_is_the_librarys(emulated, name):
    reference, (low, high), _ = FUNCTIONS[name]
    x = grid(max(low, -5), min(high, 5)).double()
    torch.testing.assert_close(apply(emulated, name, x), reference(x), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "name, values",
    [
        ("exp", {INF: INF, -INF: 0.0, 3e38: INF, -3e38: 0.0, 88.73: INF, -103.0: 2**-149, 0.0: 1.0}),
        ("tanh", {INF: 1.0, -INF: -1.0, 3e38: 1.0, -3e38: -1.0, 0.0: 0.0, 1e-40: 1e-40, -1e-45: -1e-45}),
        ("sigmoid", {INF: 1.0, -INF: 0.0, 3e38: 1.0, -3e38: 0.0, 0.0: 0.5}),
        ("cdf", {INF: 1.0, -INF: 0.0, 3e38: 1.0, -3e38: 0.0, 0.0: 0.5, -20.0: 0.0}),
        ("log", {INF: INF, 1.0: 0.0}),
        ("density", {INF: 0.0, -INF: 0.0, 3e38: 0.0, -3e38: 0.0}),
    ],
)
def test_float_function_at_the_ends(emulated, name, values):
    x = torch.tensor([*values, NAN, -NAN])
    y = apply(emulated, name, x)
    assert torch.equal(y[:-2], torch.tensor(list(values.values()))) and y[-2:].isnan().all()


def test_tanh_keeps_the_sign_of_zero(emulated):
    assert apply(emulated, "tanh", torch.tensor([-0.0])).signbit().item()


@pytest.mark.parametrize("name", ["sine", "cosine"])
def test_angles_are_reduced_without_loss(emulated, name):
    x = torch.cat(
        [torch.linspace(-30, 30, 40_001), torch.linspace(-1e6, 1e6, 40_001), torch.arange(0.0, 1001.0)]
    )
    expected = getattr(torch, name[:3])(x.double())
    assert (apply(emulated, name, x) - expected).abs().max() < 1.2e-7
    assert apply(emulated, name, torch.tensor([INF, -INF, NAN])).isnan().all()


GRADIENTS = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "relu2": lambda x: torch.relu(x).square(),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_activation_grad_is_the_derivative(emulated, kind, dtype):
    x = torch.linspace(-30, 30, 30_001, dtype=torch.float64).to(dtype)
    wide = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(GRADIENTS[kind](wide).sum(), wide)
    y = torch.full_like(x, NAN)
    emulated.test.activation_grad(y, x, kind)
    tolerance = 1e-13 if dtype == torch.float64 else 5e-7
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu"])
def test_activation_grad_has_its_limits_far_out(emulated, kind):
    x = torch.tensor([INF, 3e38, 1e20, 300.0, -300.0, -1e20, -3e38, -INF, NAN])
    y = torch.empty_like(x)
    emulated.test.activation_grad(y, x, kind)
    assert y[:4].tolist() == [1.0] * 4 and y[4:8].abs().tolist() == [0.0] * 4 and y[8].isnan()
