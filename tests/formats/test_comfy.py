"""ComfyUI's formats: tensors and marks by their definitions, and both ways."""

import json

import pytest
import torch
from torch import nn

from rfkernels import ops
from rfkernels.formats import comfy, read
from rfkernels.formats.container import open_checkpoint
from rfkernels.nn import QuantLinear

OUT, IN = 64, 256


def layer(format, bias=True, dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    return QuantLinear.from_linear(nn.Linear(IN, OUT, bias=bias).to(dtype), format, **options)


def mark(**options):
    return torch.tensor(list(json.dumps(options).encode()), dtype=torch.uint8)


def same(a, b):
    assert a.config() == b.config()
    assert set(a.state_dict()) == set(b.state_dict())
    for name, tensor in a.state_dict().items():
        other = b.state_dict()[name].reshape(tensor.shape)
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name


WRITTEN = [
    ("int8", {}, "int8_tensorwise"),
    ("int8-convrot", {}, "int8_tensorwise"),
    ("int8-convrot", {"rotation": 64}, "int8_tensorwise"),
    ("fp8", {}, "float8_e4m3fn"),
    ("fp8", {"scale": "tensor"}, "float8_e4m3fn"),
    ("w4a8", {"group": 0}, "convrot_w4a4"),
    ("w4a16", {"group": 64, "zero": "float"}, "awq_w4a16"),
    ("svdq-int4", {}, "svdquant_w4a4"),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format, options, name", WRITTEN)
def test_round_trip(format, options, name, bias, tmp_path):
    model = nn.Sequential(layer(format, bias, **options), nn.LayerNorm(OUT))
    path = tmp_path / "a.safetensors"
    comfy.write(model, path)
    checkpoint = open_checkpoint(path)
    marks = comfy.marks(checkpoint)
    assert marks["0"]["format"] == name
    assert json.loads(checkpoint.metadata["_quantization_metadata"])["layers"].keys() == {"0"}
    items = dict(read(path))
    assert set(items) == {"0", "1.weight", "1.bias"}
    same(model[0], items["0"])


def test_a_symmetric_w4a16_gets_zeros():
    plain = layer("w4a16", zero="none")
    parts, _ = comfy.tensors(plain)
    back = dict(read({f"l.{k}": v for k, v in parts.items()} | {"l.comfy_quant": mark(format="awq_w4a16")}))[
        "l"
    ]
    assert torch.equal(back.dequantized(), plain.dequantized())


@pytest.mark.parametrize("shape", [(OUT,), (OUT, 1), (), (1,)])
@pytest.mark.parametrize("rotation", [0, 64])
def test_int8_tensorwise(shape, rotation):
    codes = torch.randint(-127, 128, (OUT, IN), dtype=torch.int8)
    scale = torch.rand(shape) + 0.5
    options = {"convrot": True, "convrot_groupsize": rotation} if rotation else {}
    file = {
        "l.weight": codes,
        "l.weight_scale": scale,
        "l.comfy_quant": mark(format="int8_tensorwise", **options),
    }
    found = dict(read(file))["l"]
    weight = codes.double() * scale.double().reshape(-1, 1)
    if rotation:
        weight = (weight.unflatten(1, (-1, rotation)) @ ops.rotation_matrix(rotation)).flatten(1)
    torch.testing.assert_close(found.dequantized().double(), weight, atol=1e-4, rtol=1e-5)
    assert found.format == ("int8-convrot" if rotation else "int8") and found.dtype == torch.bfloat16


def test_convrot_w4a4_is_signed_low_nibble_first():
    packed = torch.tensor([[0x7F, 0x91] + [0] * 62] * 2, dtype=torch.uint8).view(torch.int8)
    file = {
        "l.weight": packed,
        "l.weight_scale": torch.tensor([1.0, 2.0]),
        "l.comfy_quant": mark(format="convrot_w4a4", convrot_groupsize=64, linear_dtype="int8"),
    }
    found = dict(read(file))["l"]
    turned = (found.dequantized().double().unflatten(1, (-1, 64)) @ ops.rotation_matrix(64)).flatten(1)
    expected = torch.zeros(2, 128, dtype=torch.float64)
    expected[:, :4] = torch.tensor([-1.0, 7, 1, -7])
    torch.testing.assert_close(turned, expected * torch.tensor([[1.0], [2.0]]), atol=1e-5, rtol=0)
    assert found.format == "w4a8" and found.rotation == 64


@pytest.mark.parametrize("book", [True, False])
@pytest.mark.parametrize("correction", [True, False])
def test_asym_w4a8_int8(book, correction):
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (OUT, IN), generator=g, dtype=torch.uint8)
    relative = (20 + 3 * torch.rand(OUT, IN // 16, generator=g)).to(torch.float8_e4m3fn)
    channel = torch.rand(OUT, generator=g)
    levels = torch.rand(16, generator=g).sort()[0] * 8 if book else torch.arange(-8.0, 8)
    added = torch.randn(IN // 16, OUT, generator=g) if correction else None
    file = {
        "l.weight": ops.pack_int4(codes).view(torch.int8),
        "l.weight_s_rel": relative.view(torch.uint8) if book else relative,
        "l.weight_s_channel": channel,
        "l.comfy_quant": mark(format="asym_w4a8_int8", params={"convrot_groupsize": 256, "group_size": 16}),
    }
    file |= {"l.weight_codebook": levels} if book else {}
    file |= {"l.weight_correction": added} if correction else {}
    numbers = torch.empty(OUT, IN, dtype=torch.float64)
    for n in range(OUT):
        for k in range(IN):
            step = levels[codes[n, k].long()] * relative[n, k // 16].float()
            numbers[n, k] = max(-127, min(127, round(step.item()))) * channel[n].item()
            if correction:
                numbers[n, k] += added[k // 16, n].item()
    expected = numbers @ ops.rotation_matrix(256)
    items = dict(read(file))
    found = items["l.weight"] if correction else items["l"].dequantized()
    assert numbers.abs().max() > 100 * channel.min()
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=0)


def test_float8_options():
    weight, scale = torch.randn(OUT, IN).to(torch.float8_e4m3fn), torch.tensor(0.5)
    base = {"l.weight": weight, "l.weight_scale": scale, "l.input_scale": torch.tensor([0.25])}
    of = lambda **o: dict(read(base | {"l.comfy_quant": mark(format="float8_e4m3fn", **o)}))["l"]
    assert of().quantize_input and of().input_scale.item() == 0.25
    assert not of(full_precision_matrix_mult=True).quantize_input
    del base["l.input_scale"]
    assert not of().quantize_input and of().weight_scale.dtype == torch.float32


def test_marks_of_the_header_count_too(tmp_path):
    from safetensors.torch import save_file

    layers = {"l": {"format": "int8_tensorwise"}}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    tensors = {"l.weight": torch.ones(4, 16, dtype=torch.int8), "l.weight_scale": torch.ones(4)}
    with pytest.raises(ValueError, match=r"a layout of .*comfy, .* is required"):
        list(read(tensors))  # int8 without a mark
    save_file(tensors, tmp_path / "a", metadata)
    assert dict(read(tmp_path / "a"))["l"].format == "int8"
    layers = {f"model.diffusion_model.{k}": v for k, v in layers.items()}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file({f"model.diffusion_model.{k}": v for k, v in tensors.items()}, tmp_path / "b", metadata)
    assert dict(read(tmp_path / "b"))["l"].format == "int8"
    save_file({f"other.{k}": v for k, v in tensors.items()}, tmp_path / "c", metadata)
    with pytest.raises(ValueError, match="1 layers have marks and no tensors, among them"):
        list(read(tmp_path / "c"))


def test_refusals():
    base = {"l.weight": torch.ones(4, 16, dtype=torch.int8), "l.weight_scale": torch.ones(4)}
    for message, more in {
        "l must be of int8_tensorwise, .* got 'int3'": {"l.comfy_quant": mark(format="int3")},
        r"unknown options \['flip'\]": {"l.comfy_quant": mark(format="int8_tensorwise", flip=True)},
        r"convrot_groupsize must be of \(256, 64, 16\), got 4": {
            "l.comfy_quant": mark(format="int8_tensorwise", convrot=True, convrot_groupsize=4)
        },
        r"got also \['pre_quant_scale'\]": {
            "l.comfy_quant": mark(format="int8_tensorwise"),
            "l.pre_quant_scale": torch.ones(16),
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            list(read(base | more))
    with pytest.raises(ValueError, match="no format for w4a8 in groups of 64"):
        comfy.tensors(layer("w4a8"))
    with pytest.raises(ValueError, match=r"no format for w4a16 in groups of 64, zeros torch.uint8"):
        comfy.tensors(layer("w4a16", zero="integer"))
