"""Calls of linear layers that must be refused, each with its message."""

import pytest
import torch

from rfkernels import ops
from rfkernels.ops._linear import run_linear

X, W = torch.zeros(6, 64), torch.zeros(10, 64)
CODES, FOUR = torch.zeros(10, 64, dtype=torch.int8), torch.zeros(10, 32, dtype=torch.uint8)
ONE = torch.ones(1)


def call(x=X, weight=W, out=None, **named):
    names = [
        "x_scale",
        "weight_scale",
        "weight_zero",
        "bias",
        "hidden",
        "up",
        "gate",
        "residual",
        "out_scale",
    ]
    values = [named.get(n) for n in names]
    rest = ("as they are", 0, named.get("activation", "none"), named.get("dtype", torch.float32))
    return run_linear(x, values[0], weight, *values[1:], *rest, out=out)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weight": torch.zeros(10, 63)}, r"weight must be contiguous \[out, 64\]"),
        ({"weight": torch.zeros(64, 10).T}, "weight must be contiguous"),
        ({"weight": W.double()}, "expected a weight of the dtype of x or of codes"),
        ({"weight": CODES}, "weight_scale must be given"),
        ({"weight": FOUR}, "weight_scale must be given"),
        ({"weight": CODES, "weight_scale": torch.ones(9)}, "one number or one per output 10"),
        ({"weight": CODES, "weight_scale": torch.ones(10).double()}, "weight_scale must be f32"),
        ({"weight": FOUR, "weight_scale": torch.ones(10, 3)}, "groups must divide the inputs 64"),
        ({"weight": FOUR, "weight_scale": torch.ones(10, 16)}, "multiples of 8"),
        (
            {"weight": CODES, "weight_scale": ONE, "weight_zero": ONE},
            "weight_zero belongs to four-bit weights",
        ),
        (
            {"weight": FOUR, "weight_scale": torch.ones(10, 2), "weight_zero": torch.ones(10, 4)},
            r"weight_zero must be contiguous u8 or floating \[10, 2\]",
        ),
        ({"x": X.to(torch.int8), "weight": CODES}, "x_scale must be given for codes"),
        ({"x_scale": torch.ones(6)}, "x_scale must be given for codes and only for them"),
        ({"x": X.to(torch.int8), "x_scale": torch.ones(6)}, "int8 x with int8 or four-bit weights"),
        (
            {"x": X.to(torch.int8), "weight": CODES, "weight_scale": ONE, "x_scale": torch.ones(5)},
            r"x_scale must be contiguous f32\[6\]",
        ),
        (
            {
                "x": torch.zeros(1, 65537, dtype=torch.int8),
                "weight": torch.zeros(1, 65537, dtype=torch.int8),
                "weight_scale": ONE,
                "x_scale": ONE,
            },
            "at most 65536 inputs",
        ),
        ({"bias": torch.zeros(9)}, r"bias must be contiguous \[10\]"),
        ({"bias": torch.zeros(10, dtype=torch.float16)}, "bias must be f32 or of the dtype of out or x"),
        ({"gate": torch.zeros(4, 10)}, "gate must be .* divisor of 6 rows"),
        ({"residual": torch.zeros(6, 9)}, r"residual must be \[6, 10\]"),
        ({"hidden": torch.zeros(6, 4)}, "hidden and up must be given together"),
        ({"hidden": torch.zeros(5, 4), "up": torch.zeros(10, 4)}, r"hidden must be f32\[6, rank\]"),
        ({"hidden": torch.zeros(6, 4), "up": torch.zeros(10, 5)}, r"up must be floating \[10, 4\]"),
        ({"activation": "swish"}, "activation must be none, relu, gelu"),
        ({"out_scale": ONE}, "out_scale must be given for int8 results"),
        ({"dtype": torch.int8}, "out_scale must be given for int8 results"),
        ({"dtype": torch.float64}, "f64 as x is"),
        ({"x": torch.zeros(6, 64, dtype=torch.int32)}, "x must be"),
        ({"x": torch.zeros(64)}, "two axes"),
        ({"out": torch.zeros(6, 9)}, r"out must be floating or int8 \[6, 10\]"),
        ({"x": torch.zeros(64, 6).T}, "x must be .*neighbours"),
    ],
)
def test_linear_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


def test_linear_refuses_results_over_its_inputs():
    memory = torch.zeros(6 * 64 + 10)
    x = memory[: 6 * 64].view(6, 64)
    with pytest.raises(ValueError, match="share no memory"):
        call(x=x, out=memory[5:65].view(6, 10))
    residual = torch.randn(6, 10)
    expected = call(residual=residual.clone())
    assert torch.equal(call(residual=residual, out=residual), expected)  # in place


@pytest.mark.parametrize(
    "f, message",
    [
        (lambda: ops.linear(X, W, activation="swish"), "activation must be one of none, relu"),
        (lambda: ops.linear_int8(X, CODES, ONE, x_scale=torch.ones(6)), "x_scale must be given for codes"),
        (lambda: ops.linear_int8(X.to(torch.int8), CODES, ONE), "x_scale must be given for codes"),
        (lambda: ops.linear_int8(X, CODES, ONE, rotation=48), "rotation"),
        (lambda: ops.linear_fp8(X, W.to(torch.float8_e4m3fn), rotation=16), "rotation belongs to floating x"),
        (lambda: ops.pack_int4(torch.full((2, 4), 16)), r"codes must be 0 \.\. 15"),
        (lambda: ops.pack_int4(torch.zeros(2, 3)), "last axis must be even"),
        (lambda: ops.linear(torch.tensor(1.0), W), "got a number"),
    ],
)
def test_functions_refuse_what_does_not_fit(f, message):
    with pytest.raises(ValueError, match=message):
        f()


def test_codes_have_no_gradient():
    x = torch.randn(6, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"codes have no gradient|does not require grad"):
        ops.linear(x, W, out_scale=ONE).sum().backward()
