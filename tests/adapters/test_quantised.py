"""Adapters on quantised layers: beside them, merged through their own format, and back bit for bit."""

import copy

import pytest
import torch
from torch import nn

from bench.gguf_blocks import random_blocks
from rfkernels.adapters.load import load_lora, set_adapters, unload_lora
from rfkernels.adapters.merge import merge_lora, unmerge_lora
from rfkernels.adapters.requantize import requantize
from rfkernels.nn import LoRALinear, QuantLinear
from rfkernels.quantization.model import quantize
from tests.adapters.dialects import assert_untouched, low_rank, modules_and_bits, randn
from tests.adapters.models import model_of, run

FORMATS = {
    "int8": {},
    "int8-convrot": {"rotation": 16},
    "fp8": {"scale": "row"},
    "fp8 tensor": {"scale": "tensor"},
    "w4a16": {"zero": "float"},
    "w4a16 integer": {"zero": "integer"},
    "w4a16 symmetric": {"zero": "none"},
    "w4a8": {"rotation": 16},
    "svdq-int4": {"rank": 8, "group": 64},
}
OUT, IN = 24, 128


def quantised(case: str, weight: torch.Tensor | None = None) -> nn.Module:
    linear = nn.Linear(IN, OUT).requires_grad_(False)
    linear.weight.copy_(randn(OUT, IN, seed=1) if weight is None else weight)
    linear.bias.copy_(randn(OUT, seed=2))
    if case == "gguf":
        blocks = random_blocks("Q8_0", OUT, IN)
        return nn.ModuleDict({"fc": QuantLinear("gguf", blocks, bias=linear.bias, kind="Q8_0")})
    return nn.ModuleDict({"fc": QuantLinear.from_linear(linear, case.split()[0], **FORMATS[case])})


def lora(rank: int = 4, size: float = 1.0) -> dict[str, torch.Tensor]:
    a, b = randn(rank, IN, seed=3).float(), size * randn(OUT, rank, seed=4).float()
    return {"fc.lora_A.weight": a, "fc.lora_B.weight": b}


def delta(tensors) -> torch.Tensor:
    return tensors["fc.lora_B.weight"] @ tensors["fc.lora_A.weight"]


@pytest.mark.parametrize("case", [*FORMATS, "gguf"])
def test_beside(case):
    """y = base(x) + w s (x A^T) B^T + bias, whatever the base does to x."""
    model, x = quantised(case), randn(3, 5, IN, seed=5).float() * 10
    before = modules_and_bits(model)
    plain, tensors = model["fc"](x), lora() | {"fc.diff_b": randn(OUT, seed=6).float()}
    load_lora(model, tensors, 0.5)
    assert isinstance(model["fc"], LoRALinear)
    wanted = plain + 0.5 * (x @ delta(tensors).T + tensors["fc.diff_b"])
    torch.testing.assert_close(model["fc"](x), wanted, rtol=1e-5, atol=1e-5)
    set_adapters(model, "adapter_0", torch.tensor([[1.0], [0.0], [-1.0]]))
    y = model["fc"](x)
    branch = x @ delta(tensors).T + tensors["fc.diff_b"]
    wanted = plain + torch.tensor([1.0, 0, -1])[:, None, None] * branch
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    unload_lora(model)
    assert_untouched(model, before)


def test_blocks_of_a_file_are_not_merged_into():
    model, x = quantised("gguf"), randn(3, IN, seed=5).float()
    load_lora(model, lora())
    before, y = modules_and_bits(model), model["fc"](x)
    with pytest.raises(ValueError, match=r"fc must have a weight that can be written, got blocks .*Q8_0"):
        merge_lora(model)
    assert_untouched(model, before)
    assert torch.equal(model["fc"](x), y)
    with pytest.raises(ValueError, match="a layer must have a weight that can be written"):
        requantize(model["fc"].base, torch.zeros(OUT, IN))


@pytest.mark.parametrize("case", FORMATS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_merged(case, rounding):
    """As near to W + dW as quantising that anew; sqrt 2 of it by stochastic rounding. Unmerging is exact."""
    model, tensors = quantised(case), lora()
    wanted = model["fc"].dequantized() + delta(tensors)
    before = modules_and_bits(model)
    load_lora(model, tensors)
    merge_lora(model, rounding=rounding, seed=3)
    assert isinstance(model["fc"], QuantLinear)
    error = (model["fc"].dequantized() - wanted).norm()
    fresh = (quantised(case, wanted)["fc"].dequantized() - wanted).norm()
    factor = {"nearest": 1.1, "stochastic": 1.65}[rounding]
    assert error < factor * fresh * (1.5 if case == "svdq-int4" else 1)  # its low-rank part stays
    unmerge_lora(model)
    unload_lora(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("case", FORMATS)
def test_stochastic_merge_has_the_mean(case):
    """Over seeds the merged weight is W + dW, though dW is far below a step: E[SR(W + dW)] = W + dW."""
    model = quantised(case)
    start, tensors = model["fc"].dequantized(), lora(size=0.02)
    load_lora(model, tensors)
    change, seeds = torch.zeros(OUT, IN), 48
    for seed in range(seeds):
        merge_lora(model, rounding="stochastic", seed=seed)
        change += (model["fc"].dequantized() - start) / seeds
        unmerge_lora(model)
    wanted = delta(tensors)
    share = (change * wanted).sum() / wanted.square().sum()
    noise = (model["fc"].base.dequantized() - start).norm()
    assert noise == 0
    merge_lora(model, rounding="stochastic", seed=0)
    spread = float(
        (model["fc"].dequantized() - start).norm() / wanted.norm() / (OUT * IN) ** 0.5 / seeds**0.5
    )
    assert abs(share - 1) < 4 * spread + 0.02


@pytest.mark.parametrize("case", ["int8", "fp8", "fp8 tensor"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_nan_in_a_new_weight_shows(case, rounding):
    """int8 has no NaN: the scale of the row carries it."""
    layer = quantised(case)["fc"]
    weight = layer.dequantized()
    weight[3, 5] = torch.nan
    requantize(layer, weight, rounding)
    rows = layer.dequantized().isnan()
    assert rows[3].all() and (case == "fp8 tensor" or rows.sum() == IN)


def test_dora_and_differences_beside_codes():
    """DoRA's k folds into scales; a full difference stands beside the layer."""
    model, x = quantised("int8"), randn(3, IN, seed=5).float() * 10
    before = modules_and_bits(model)
    weight, tensors = model["fc"].dequantized(), lora()
    plain = copy.deepcopy(model["fc"])
    magnitude = randn(OUT, seed=7).float().abs() * 20
    load_lora(model, tensors | {"fc.lora_magnitude_vector": magnitude})
    k = magnitude / (weight + delta(tensors)).norm(dim=1)
    bias = plain.bias
    wanted = k * (plain(x) - bias + x @ delta(tensors).T) + bias
    torch.testing.assert_close(model["fc"](x), wanted, rtol=1e-4, atol=1e-4)
    unload_lora(model)
    diff = randn(OUT, IN, seed=8).float()
    report = load_lora(model, {"fc.diff": diff}, 0.5)
    assert report.layers == {"fc": "Dense"}
    torch.testing.assert_close(model["fc"](x), plain(x) + 0.5 * x @ diff.T, rtol=1e-4, atol=1e-4)
    merge_lora(model)
    torch.testing.assert_close(model["fc"].dequantized(), weight + 0.5 * diff, rtol=0, atol=2e-3)
    unload_lora(model)
    assert_untouched(model, before)
    with pytest.raises(ValueError, match=r"fc\.weight must be a parameter to be replaced"):
        load_lora(model, {"fc.set_weight": diff})


@pytest.mark.parametrize(("format", "tolerance"), [("int8", 6e-2), ("w4a16", 1e-5)])
def test_whole_model(format, tolerance):
    """quantize, then a file in the original names: FLUX with the dequantised weights and the same LoRA."""
    model, reference = model_of("flux", dtype=torch.float32), model_of("flux")
    options = {"group": 8} if format == "w4a16" else {}
    quantize(model, format, keep=(), modulation=format, min_size=0, **options)
    for path, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            reference.get_submodule(path).weight.copy_(layer.dequantized())
    before, plain = modules_and_bits(model), run(model, "flux", torch.float32)
    tensors, _ = low_rank(reference, "kohya")
    for loaded in (model, reference):
        report = load_lora(loaded, tensors, 5.0)
    assert sum(isinstance(model.get_submodule(p).base, QuantLinear) for p in report.layers) > 20
    wanted = run(reference, "flux")
    error = (run(model, "flux", torch.float32) - wanted).norm() / wanted.norm()
    assert error < tolerance < (plain - wanted).norm() / wanted.norm()
    set_adapters(model, "adapter_0", 0.0)
    torch.testing.assert_close(run(model, "flux", torch.float32), plain, rtol=1e-5, atol=1e-5)
    unload_lora(model)
    assert_untouched(model, before)
