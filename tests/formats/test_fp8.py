"""float8 checkpoints of every dialect."""

import pytest
import torch
from torch import nn

from rfkernels import ops
from rfkernels.formats import fp8, load, read
from rfkernels.nn import QuantLinear


def layer(scale="row", quantize_input=False, dtype=torch.bfloat16):
    torch.manual_seed(0)
    linear = nn.Linear(32, 48).to(dtype)
    return QuantLinear.from_linear(linear, "fp8", scale=scale, quantize_input=quantize_input)


def test_old_names_of_comfyui():
    weight, scale = torch.randn(48, 32).to(torch.float8_e4m3fn), torch.tensor(0.123456789)
    file = {
        "l.weight": weight,
        "l.scale_weight": scale,
        "l.scale_input": torch.tensor(2.0),
        "n.weight": torch.ones(3),
    }
    for count, quantised in ((0, True), (2, False)):
        mark = torch.zeros(count).to(torch.float8_e4m3fn)
        items = dict(read(file | {"scaled_fp8": mark}))
        assert set(items) == {"l", "n.weight"}
        found = items["l"]
        assert found.quantize_input == quantised and found.input_scale.item() == 2
        assert torch.equal(found.weight_scale, scale)  # float32 stays float32
        torch.testing.assert_close(found.dequantized(), weight.float() * scale)


def test_bfl_quantises_tokens_per_row():
    weight, scale = torch.randn(48, 32).to(torch.float8_e4m3fn), torch.rand(48)
    found = dict(read({"l.weight": weight, "l.weight_scale": scale}))["l"]
    x = torch.randn(7, 32)
    codes, x_scale = ops.quantize(x, "fp8")
    expected = (codes.double() * x_scale.double()[:, None]) @ (weight.double() * scale.double()[:, None]).T
    torch.testing.assert_close(found(x).double(), expected, atol=1e-4, rtol=1e-5)


def test_plain_casts_and_what_is_no_matrix():
    weight = torch.randn(48, 32).to(torch.float8_e4m3fn)
    norm, wide = torch.randn(9).to(torch.float8_e4m3fn), torch.randn(4, 8).to(torch.float8_e5m2)
    file = {
        "l.weight": weight,
        "norm.weight": norm,
        "e.weight": wide,
        "e.bias": torch.ones(4),
        "e.weight_scale": torch.tensor(3.0),
    }
    items = dict(read(file))
    assert not items["l"].quantize_input and items["l"].weight_scale is None
    assert torch.equal(items["l"].dequantized(), weight.float())
    assert torch.equal(items["norm.weight"], norm.float())
    assert torch.equal(items["e.weight"], wide.float() * 3) and torch.equal(items["e.bias"], torch.ones(4))


@pytest.mark.parametrize(
    "dialect, made",
    [("bfl", layer(quantize_input=True)), ("comfy-old", layer("tensor")), ("plain", None)],
)
def test_round_trip(dialect, made, tmp_path):
    made = made or QuantLinear("fp8", torch.randn(48, 32).to(torch.float8_e4m3fn), bias=torch.ones(48))
    model = nn.Sequential(made, nn.LayerNorm(48))
    fp8.write(model, tmp_path / "a.safetensors", dialect)
    with torch.device("meta"):
        target = nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48))
    back = load(target, tmp_path / "a.safetensors")
    assert torch.equal(back[0].dequantized(), made.dequantized())
    assert back[0].quantize_input == made.quantize_input and torch.equal(back[0].bias, made.bias)
    x = torch.randn(3, 32)
    assert torch.equal(back(x), model(x))


def test_refusals():
    weight = torch.randn(48, 32).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"fp8: l must have weight, .* got also \['smooth'\]"):
        list(read({"l.weight": weight, "l.smooth": torch.ones(32)}))
    with pytest.raises(ValueError, match=r"a layer of fp8 and one of .* are required, got fp8, 'new'"):
        fp8.tensors(layer(), "new")
    with pytest.raises(ValueError, match="a plain cast has no scale"):
        fp8.tensors(layer(), "plain")
    with pytest.raises(ValueError, match=r"one scale a layer, got \[48\]"):
        fp8.tensors(layer(), "comfy-old")
