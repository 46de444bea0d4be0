"""Checkpoints into models: detection, names, parts of fused layers, refusals, the container."""

import json

import pytest
import torch
from torch import nn

from rfkernels.formats import Part, bnb, comfy, fp8, load, nunchaku, nvfp4, original_names, read
from rfkernels.formats.container import Checkpoint, open_checkpoint, write_safetensors
from rfkernels.formats.load import reader_of
from rfkernels.nn import QuantLinear
from rfkernels.quantization.model import quantize


def test_detection():
    one, e4m3 = torch.ones(1), torch.ones(2, 2).to(torch.float8_e4m3fn)
    for names, reader in (
        ({"l.weight": e4m3, "l.comfy_quant": one}, comfy),
        ({"l.qweight": one, "l.wscales": one}, nunchaku),
        ({"l.weight": one, "l.weight_scale_2": one, "l.weight_scale": e4m3}, nvfp4),
        ({"l.weight": one, "l.weight.quant_state.bitsandbytes__fp4": one}, bnb),
        ({"l.weight": one, "l.SCB": one}, bnb),
        ({"l.weight": e4m3}, fp8),
        ({"l.weight": one, "scaled_fp8": one}, fp8),
        ({"l.weight": one}, None),
    ):
        assert reader_of(Checkpoint(names)) is reader
    with pytest.raises(ValueError, match=r"got 1 keys like \['l.packed \(torch.uint8\)'\]"):
        list(read({"l.weight": one, "l.packed": torch.zeros(2, dtype=torch.uint8)}))


class Target(nn.Module):
    """Attention as diffusers has it: q, k, v of their own."""

    def __init__(self, bias=True):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(32, 32, bias=bias) for _ in range(3))
        self.mod, self.norm = nn.Linear(32, 64), nn.LayerNorm(32)


def rename(name):
    if name.startswith("qkv."):
        leaf = name.removeprefix("qkv.")
        return [Part(f"to_{x}.{leaf}", 32 * i, 32 * i + 32) for i, x in enumerate("qkv")]
    if name.startswith("adaLN."):
        return [Part(name.replace("adaLN", "mod"), 0, 64, swap=True)]
    return name.replace("ln.", "norm.").replace("scale", "weight")


def source():
    torch.manual_seed(0)
    model = nn.Module()
    model.qkv, model.adaLN, model.ln = nn.Linear(32, 96), nn.Linear(32, 64), nn.LayerNorm(32)
    return model


@pytest.mark.parametrize("method", [None, "int8", "fp8", "w4a16", "svdq-int4"])
def test_parts_of_fused_layers(method, tmp_path):
    model = source()
    if method:
        quantize(model, method, min_size=0, keep=(), **({"group": 32} if "4" in method else {}))
    weight = lambda m: m.dequantized() if isinstance(m, QuantLinear) else m.weight
    if method is None:
        file = {"model.diffusion_model." + k: v for k, v in model.state_dict().items()}
    elif method == "w4a16" or method == "svdq-int4":
        comfy.write(model, file := tmp_path / "a")
    else:
        (fp8.write if method == "fp8" else comfy.write)(model, file := tmp_path / "a")
    with torch.device("meta"):
        target = Target()
    load(target, file, rename=rename)
    for i, layer in enumerate((target.to_q, target.to_k, target.to_v)):
        assert isinstance(layer, QuantLinear if method else nn.Linear)
        torch.testing.assert_close(
            weight(layer), weight(model.qkv)[32 * i : 32 * i + 32], atol=1e-6, rtol=1e-6
        )
        assert torch.equal(layer.bias, model.qkv.bias[32 * i : 32 * i + 32])
    swapped = torch.cat((model.adaLN.bias[32:], model.adaLN.bias[:32]))
    assert torch.equal(target.mod.bias, swapped) and torch.equal(target.norm.weight, model.ln.weight)


def test_requantising_floating_checkpoints():
    target = load(Target(), source().state_dict(), rename=rename, method="int8-convrot", rotation=16)
    assert {type(m) for m in target.children()} == {QuantLinear, nn.LayerNorm}
    assert target.to_q.rotation == 16
    torch.testing.assert_close(target.to_q.dequantized(), source().qkv.weight[:32], atol=4e-3, rtol=0)
    assert torch.equal(target.to_q.bias, source().qkv.bias[:32])


def test_dtype_is_the_models():
    target = load(Target().bfloat16(), source().state_dict(), rename=rename)
    assert {p.dtype for p in target.parameters()} == {torch.bfloat16}


def test_embeddings_stored_like_layers_are_decoded():
    model = nn.Sequential(nn.Embedding(16, 32))
    weight = torch.randn(16, 32).to(torch.float8_e4m3fn)
    load(model, {"0.weight": weight})
    assert torch.equal(model[0].weight, weight.float())


def test_refusals():
    state = source().state_dict()
    with pytest.raises(ValueError, match=r"qkv.weight becomes qkv.weight, which the Target has not"):
        load(Target(), state)
    with pytest.raises(ValueError, match=r"1 tensors are missing, among them \['norm.bias'\]"):
        load(Target(), {k: v for k, v in state.items() if k != "ln.bias"}, rename=rename)
    with pytest.raises(ValueError, match=r"qkv.bias must have 96 rows for .*, got 95"):
        load(Target(), state | {"qkv.bias": torch.ones(95)}, rename=rename)
    with pytest.raises(ValueError, match=r"norm.weight must be \[32\], got \[31\]"):
        load(Target(), state | {"ln.weight": torch.ones(31)}, rename=rename)
    fp8_layer = {"0.weight": torch.zeros(8, 32).to(torch.float8_e4m3fn), "0.bias": torch.ones(8)}
    with pytest.raises(
        ValueError, match=r"0 must have outputs, inputs, bias \(8, 32, False\), got \(8, 32, True\)"
    ):
        load(nn.Sequential(nn.Linear(32, 8, bias=False)), fp8_layer)


def test_container_is_safetensors(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file

    tensors = {
        "a": torch.randn(3, 5)[:, 1:],
        "b": torch.tensor(7, dtype=torch.int64),
        "c": torch.randn(2, 3).to(torch.float8_e5m2),
        "d": torch.randn(4).bfloat16(),
        "e": torch.zeros(0, 3),
        "f": torch.tensor([True, False]),
    }
    write_safetensors(tmp_path / "x", tensors.items(), {"k": "v"})
    back = load_file(tmp_path / "x")
    assert safe_open(tmp_path / "x", "pt").metadata() == {"k": "v"}
    ours = open_checkpoint(tmp_path / "x")
    assert ours.metadata == {"k": "v"} and set(ours) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == ours.dtype(name) == tensor.dtype and back[name].shape == tensor.shape
        assert torch.equal(back[name].double(), tensor.double()) and torch.equal(
            ours[name].double(), tensor.double()
        )
    with pytest.raises(ValueError, match=r"b has the dtype torch.complex64"):
        write_safetensors(tmp_path / "x", [("b", torch.ones(1).to(torch.complex64))])
    with pytest.raises(ValueError, match="a is there twice"):
        write_safetensors(tmp_path / "x", [("a", torch.ones(1))] * 2)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    for name in ("a", "aa", "aaa"):  # numbers start at multiples of eight bytes
        write_safetensors(tmp_path / "x", [(name, torch.ones(1))])
        assert int.from_bytes((tmp_path / "x").read_bytes()[:8], "little") % 8 == 0


def test_prefixes_go_only_where_all_names_have_them():
    one = torch.ones(1)
    both = Checkpoint({"model.a": one, "model.b": one}).without_prefix("model.")
    assert list(both) == ["a", "b"] and both["a"] is one and both.dtype("a") == torch.float32
    assert list(Checkpoint({"model.a": one, "b": one}).without_prefix("model.")) == ["model.a", "b"]


def test_original_names_of_flux():
    """BFL's fused layers, in int8 with rotation, as ComfyUI stores them, into diffusers' model."""
    from tests.quantization.models import flux, run

    model = flux()
    state, blocks = model.state_dict(), {}
    double, single = "transformer_blocks.0.", "single_transformer_blocks.0."
    for kind in ("weight", "bias"):
        get = lambda prefix, *names, kind=kind: torch.cat([state.pop(f"{prefix}{n}.{kind}") for n in names])
        blocks[f"double_blocks.0.img_attn.qkv.{kind}"] = get(double, "attn.to_q", "attn.to_k", "attn.to_v")
        names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        blocks[f"single_blocks.0.linear1.{kind}"] = get(single, *names)
        scale, shift = get("", "norm_out.linear").chunk(2)
        blocks[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat((shift, scale))
    blocks["double_blocks.0.img_attn.norm.query_norm.scale"] = state.pop(f"{double}attn.norm_q.weight")
    file = {}
    for name, tensor in (blocks | state).items():
        layer, _, leaf = name.rpartition(".")
        if "qkv" not in name and "linear1" not in name:
            file[name] = tensor
        elif leaf == "weight":
            linear = nn.Linear(*reversed(tensor.shape))
            linear.weight.data, linear.bias.data = tensor, blocks[f"{layer}.bias"]
            parts, mark = comfy.tensors(QuantLinear.from_linear(linear, "int8-convrot"))
            file |= {f"{layer}.{k}": v for k, v in parts.items()}
            file[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
    expected = run(model)
    target = flux(seed=1)
    load(target, {f"model.diffusion_model.{k}": v for k, v in file.items()}, rename=original_names(target))
    assert sum(isinstance(m, QuantLinear) for m in target.modules()) == 7
    assert (run(target) - expected).norm() < 5e-3 * expected.norm()
