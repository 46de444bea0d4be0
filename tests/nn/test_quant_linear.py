"""QuantLinear: every format against its own dequantised weight, and as a module of torch."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rfkernels import ops
from rfkernels.nn import FORMATS, QuantLinear

CASES = [
    *((f, {}) for f in FORMATS),
    ("int8-convrot", {"rotation": 16}),
    ("fp8", {"scale": "tensor"}),
    ("fp8", {"quantize_input": True}),
    ("w4a16", {"zero": "none", "group": 128}),
    ("w4a16", {"zero": "integer", "group": 32}),
    ("w4a8", {"group": 0}),
    ("svdq-int4", {"quantize_input": False}),
]
every_case = pytest.mark.parametrize("format, options", CASES, ids=[f"{f}-{o}" for f, o in CASES])


def linear(out=192, width=256, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(width, out, bias=bias)
    with torch.no_grad():
        layer.weight[3] = 0
        layer.weight[:, 7] *= 20
    return layer.to(dtype)


def tokens(layer, x):
    """What the layer multiplies: x with its tokens rounded as the format does, in the basis of x."""
    if not layer.quantize_input:
        return x
    format = "fp8" if layer.format == "fp8" else "int8"
    smooth = 1 if layer.smooth is None else layer.smooth
    codes, scale = ops.quantize(x / smooth, format, rotation=layer.rotation)
    back = codes.float() * scale[..., None]
    if layer.rotation:
        back = back.unflatten(-1, (-1, layer.rotation)) @ ops.rotation_matrix(layer.rotation).float()
        back = back.flatten(-2)
    return back * smooth


def expected(layer, x, column=1.0):
    """x W^T in float64 of the layer's own operands; the low-rank branch of SVDQuant takes x as it is."""
    weight = layer.dequantized().double()
    rounded = tokens(layer, x.float()).double()
    if layer.smooth is None:
        return rounded @ weight.T * column
    branch = layer.proj_up.double() @ layer.proj_down.double()
    return (rounded @ (weight - branch).T + x.double() @ branch.T) * column


def close(a, b, tolerance=2e-6):
    assert (a.double() - b).norm() <= tolerance * b.norm()


@every_case
def test_is_the_product_with_its_dequantised_weight(format, options):
    base = linear()
    layer = QuantLinear.from_linear(base, format, **options)
    x = torch.randn(2, 9, 256)
    close(layer(x), expected(layer, x) + base.bias.double())
    assert layer(torch.zeros(2, 256)).equal(base.bias.expand(2, -1))  # zero rows: no NaN
    assert (layer.in_features, layer.out_features) == (256, 192)
    assert layer.dequantized().dtype == torch.float32 and layer.weight_scale.isfinite().all()


@every_case
def test_epilogue_column_scale_and_branches(format, options):
    base = linear()
    layer = QuantLinear.from_linear(base, format, **options)
    x = torch.randn(2, 9, 256)
    column, bias = torch.rand(192) + 0.5, torch.randn(192)
    down, up = torch.randn(8, 256) / 16, torch.randn(192, 8)
    gate, residual = torch.randn(2, 1, 192), torch.randn(2, 9, 192)
    hidden = ops.lora_shrink(x, down, torch.rand(2, 1, 8))
    ours = layer.run(
        x,
        lora=(hidden, up),
        column_scale=column,
        bias=bias,
        activation="gelu",
        gate=gate,
        residual=residual,
    )
    y = expected(layer, x, column.double()) + hidden.double() @ up.double().T
    y = F.gelu(y + base.bias.double() + bias.double())
    close(ours, residual.double() + gate.double() * y, 4e-6)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_layers(format, options, dtype):
    base = linear(dtype=dtype)
    layer = QuantLinear.from_linear(base, format, **options)
    assert layer.dtype == dtype and layer.bias.dtype == dtype
    x = torch.randn(3, 256).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    tolerance = 2e-2 if layer.smooth is not None else 2e-3 if dtype == torch.float16 else 6e-3
    close(y, expected(layer, x) + base.bias.double(), tolerance)
    wide = layer(x.float())  # tokens of another dtype than the layer's
    assert wide.dtype == torch.float32
    close(wide, expected(layer, x) + base.bias.double(), 1e-3)


@every_case
def test_is_a_module_of_torch(format, options):
    layer = QuantLinear.from_linear(linear(), format, **options)
    x = torch.randn(5, 256)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = QuantLinear.from_linear(linear(seed=1), format, **options)
    assert not torch.equal(other(x), y)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), y)
    rebuilt = QuantLinear(**layer.state_dict(), **{**layer.config(), "dtype": layer.dtype})
    assert torch.equal(rebuilt(x), y)
    torch._dynamo.reset()  # graphs of other formats count against one limit
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)
    assert not any(p.requires_grad for p in layer.parameters())


@every_case
def test_casts_keep_what_is_stored(format, options):
    layer = QuantLinear.from_linear(linear(), format, **options)
    before = {n: t.clone() for n, t in layer.named_buffers()}
    numbers = layer.dequantized()
    layer.to(torch.bfloat16)
    assert layer.dtype == layer.bias.dtype == torch.bfloat16
    layer.float()
    assert layer.dtype == torch.float32
    for name, tensor in layer.named_buffers():
        assert tensor.dtype == before[name].dtype
    assert torch.equal(layer.dequantized(), numbers)
    assert layer.to("meta").device.type == "meta"


@every_case
def test_rows(format, options):
    layer = QuantLinear.from_linear(linear(), format, **options)
    rows, x = torch.tensor([7, 3, 100]), torch.randn(4, 256)
    part = layer.take_rows(rows)
    torch.testing.assert_close(part(x), layer(x)[:, rows])
    torch.testing.assert_close(part.dequantized(), layer.dequantized()[rows])


def test_static_scale_of_the_tokens():
    base, x = linear(), torch.randn(5, 256)
    scale = torch.tensor(0.01)
    weight, weight_scale = ops.quantize(base.weight.detach(), "fp8")
    layer = QuantLinear("fp8", weight, weight_scale, bias=base.bias, input_scale=scale, quantize_input=True)
    rounded = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()
    close(layer(x), rounded @ layer.dequantized().double().T + base.bias.double())
    kept = QuantLinear("fp8", weight, weight_scale, bias=base.bias, input_scale=scale, quantize_input=False)
    close(kept(x), x.double() @ layer.dequantized().double().T + base.bias.double())


def test_fp8_without_a_scale():
    weight = torch.randn(8, 32).to(torch.float8_e4m3fn)
    layer, x = QuantLinear("fp8", weight), torch.randn(3, 32)
    close(layer(x), x.double() @ weight.double().T)
    column = torch.rand(8)
    close(layer.run(x, column_scale=column), x.double() @ weight.double().T * column.double())


def test_sizes():
    base = linear(bias=False)
    sizes = {f: QuantLinear.from_linear(base, f).nbytes / base.weight.nbytes for f in FORMATS}
    assert sizes["int8"] == pytest.approx(0.25, abs=0.01) and sizes["fp8"] == sizes["int8"]
    assert sizes["w4a16"] == pytest.approx(0.125 + 2 / 64, abs=0.001)  # float32 scales and zeros here
    assert sizes["w4a8"] == pytest.approx(0.125 + 1 / 64, abs=0.001)


def test_repr():
    text = repr(QuantLinear.from_linear(linear(), "svdq-int4", rank=16))
    assert text == (
        "QuantLinear(in_features=256, out_features=192, format='svdq-int4', group=64, rank=16, bias=True)"
    )


def test_refusals():
    codes, scale = torch.zeros(8, 32, dtype=torch.int8), torch.ones(8)
    four = torch.zeros(8, 32, dtype=torch.uint8)
    for message, call in {
        "format must be one of int8,": lambda: QuantLinear("int3", codes, scale),
        r"weight must be torch.int8 \[out, in\], got torch.uint8 \[8, 32\]": lambda: QuantLinear(
            "int8", four, scale
        ),
        "weight_scale must be there, got nothing": lambda: QuantLinear("int8", codes),
        r"weight_scale must be floating \[8\], got torch.float32 \[7\]": lambda: QuantLinear(
            "int8", codes, scale[1:]
        ),
        r"rotation must be one of .* that divides 32, got 64": lambda: QuantLinear(
            "int8-convrot", codes, scale, rotation=64
        ),
        "rotation must be 0, got 16": lambda: QuantLinear("int8", codes, scale, rotation=16),
        r"or \[8, groups\], got torch.float32 \[8, 3\]": lambda: QuantLinear("w4a8", four, torch.ones(8, 3)),
        "weight_zero must be absent": lambda: QuantLinear("w4a8", four, torch.ones(8, 2), torch.ones(8, 2)),
        r"bias must be \[8\]": lambda: QuantLinear("int8", codes, scale, bias=torch.ones(9)),
        "input_scale must be one number, of fp8": lambda: QuantLinear(
            "int8", codes, scale, input_scale=torch.ones(())
        ),
        "smooth must be given for svdq-int4": lambda: QuantLinear("svdq-int4", four, scale),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    bad = linear()
    with torch.no_grad():
        bad.weight[0, 0] = torch.nan
    for format in FORMATS:
        with pytest.raises(ValueError, match=r"the weight of blocks.3.ff \(192, 256\) must be finite"):
            QuantLinear.from_linear(bad, format, name="blocks.3.ff")
