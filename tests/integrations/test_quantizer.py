"""Quantised while diffusers loads, saved, and read back."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.quantizers.auto import DiffusersAutoQuantizer

import rfkernels
from rfkernels.integrations.quantizer import RfkernelsConfig
from rfkernels.nn import QuantLinear
from tests.models.cases.flux import CONFIG, inputs
from tests.models.parity import cast, error

METHODS = {
    "int8": {},
    "int8-convrot": {"rotation": 16},
    "fp8": {"scale": "row"},
    "w4a16": {"group": 32},
}
INPUTS = cast(inputs(), torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model whose widths are multiples of 32."""
    config = CONFIG | {"attention_head_dim": 32, "num_attention_heads": 2, "axes_dims_rope": (8, 12, 12)}
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**config).bfloat16()
    path = tmp_path_factory.mktemp("flux")
    model.save_pretrained(path, max_shard_size="300KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


@torch.no_grad()
def run(model):
    return model.eval()(**INPUTS, return_dict=False)[0]


def loaded(path, **options) -> FluxTransformer2DModel:
    return FluxTransformer2DModel.from_pretrained(path, torch_dtype=torch.bfloat16, **options)


def states_equal(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    same = a.keys() == b.keys() and all(a[n].dtype == b[n].dtype for n in a)
    return same and all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a)


@pytest.mark.parametrize("method", METHODS)
def test_loading_is_loading_and_quantize(folder, tmp_path, method):
    config = RfkernelsConfig(method, modulation="w4a16", min_size=0, options=METHODS[method])
    model = loaded(folder, quantization_config=config)
    expected = loaded(folder)
    rfkernels.quantize(expected, method, modulation="w4a16", min_size=0, **METHODS[method])
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) > 30
    assert not any(t.is_meta for t in model.state_dict().values())
    assert states_equal(model, expected)
    assert torch.equal(run(model), run(expected))

    model.save_pretrained(tmp_path, max_shard_size="200KB")
    again = loaded(tmp_path)  # its config.json says how
    assert states_equal(again, model)  # scales keep their float32
    assert torch.equal(run(again), run(model))


def test_with_accelerate(folder):
    config = RfkernelsConfig("int8", min_size=0)
    plain, model = loaded(folder), loaded(folder, quantization_config=config)
    rfkernels.accelerate(model)
    assert error(run(model), run(plain)) < 0.05
    assert "of int8: linear" in str(rfkernels.explain(model))


def test_skip_and_keep(folder):
    config = RfkernelsConfig("int8", skip=["transformer_blocks.0.*"], keep=["proj_out"], min_size=0)
    model = loaded(folder, quantization_config=config)
    quantised = {n for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert "x_embedder" in quantised and "proj_out" not in quantised
    assert not any(n.startswith("transformer_blocks.0.") for n in quantised)


def test_config_as_text():
    config = RfkernelsConfig("w4a16", options={"group": 32}, skip=("a",))
    assert "w4a16" in repr(config)
    again = DiffusersAutoQuantizer.from_dict(config.to_dict())
    assert isinstance(again, RfkernelsConfig) and again.to_dict() == config.to_dict()


def test_refusals(folder, tmp_path):
    with pytest.raises(ValueError, match="method must be one of int8"):
        loaded(folder, quantization_config=RfkernelsConfig("int3"))
    with pytest.raises(ValueError, match="quant_method must be 'rfkernels', got 'bnb'"):
        RfkernelsConfig(quant_method="bnb")
    model = loaded(folder, quantization_config=RfkernelsConfig("int8", min_size=0))
    layer = model.hf_quantizer.quantization_config.layers["transformer_blocks.0.attn.to_q"]
    layer["tensors"]["weight"][1] = [64, 32]
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"to_q.weight must be \[64, 32\], got \[64, 64\]"):
        loaded(tmp_path)
