"""`quantize` on models of diffusers: what it replaces, reports, refuses, and how much memory it takes."""

import json
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rfkernels.models.emoji import EmojiFlow
from rfkernels.nn import FORMATS, QuantLinear
from rfkernels.quantization.model import quantize
from rfkernels.quantization.rules import _TABLE, matches, rules_of
from tests.quantization.models import Odd, flux, formats, run, shared

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("method", FORMATS)
def test_a_model_runs_and_is_close(method):
    expected, model = run(flux()), flux()
    report = quantize(model, method, modulation="w4a16")
    assert (run(model) - expected).norm() < 0.02 * expected.norm()
    assert len(report.layers) == 30 and len(formats(model)) == 20
    for layer in report.layers:
        kept = layer.format == "high"
        assert kept == (layer.name not in formats(model)) == (layer.snr_db is None) == bool(layer.reason)
        assert layer.bytes_after == layer.bytes_before if kept else layer.bytes_after < layer.bytes_before
    norm = report["transformer_blocks.0.norm1.linear"]
    assert norm.format == "w4a16" and norm.shape == (768, 128) and norm.snr_db > 20


def test_report():
    model, seen = flux(), []
    report = quantize(model, "int8", progress=seen.append)
    assert seen == report.layers
    before = sum(p.nbytes for m in flux().modules() if isinstance(m, nn.Linear) for p in m.parameters())
    after = sum(
        t.nbytes
        for m in model.modules()
        if isinstance(m, (nn.Linear, QuantLinear))
        for t in (*m.parameters(), *m.buffers())
    )
    assert (report.bytes_before, report.bytes_after) == (before, after)
    data = json.loads(report.to_json())
    assert data["totals"] == {"bytes_before": before, "bytes_after": after} and data["method"] == "int8"
    assert [layer["name"] for layer in data["layers"]] == [layer.name for layer in report.layers]
    text = str(report)
    assert "transformer_blocks.0.attn.to_q" in text and "kept: modulation" in text
    assert text.splitlines()[-1].startswith("30 linear layers, 13 of them as they were: ")
    assert report.worst.snr_db == min(layer.snr_db for layer in report.layers if layer.snr_db is not None)


def test_signal_to_noise_ratio_is_that_of_the_weight():
    model = flux()
    weight = model.transformer_blocks[0].ff.net[2].weight.detach().double()
    report = quantize(model, "w4a8")
    stored = model.transformer_blocks[0].ff.net[2].dequantized().double()
    layer = report["transformer_blocks.0.ff.net.2"]
    assert layer.snr_db == pytest.approx(20 * torch.log10(weight.norm() / (weight - stored).norm()).item())
    assert layer.cosine == pytest.approx(
        (weight * stored).sum().item() / (weight.norm() * stored.norm()).item()
    )


def test_which_layers():
    model = flux()
    quantize(model, "fp8", skip=["*.attn.*"], keep=["proj_out"], min_size=5000)
    names = set(formats(model))
    assert "x_embedder" in names and "proj_out" not in names and not any(".attn." in n for n in names)
    assert "time_text_embed.text_embedder.linear_1" not in names  # 128 x 32
    model = flux()
    report = quantize(model, "w4a8", group=96)
    assert report["transformer_blocks.0.attn.to_q"].reason == "kept: a group of 96 does not divide 128 inputs"
    assert not formats(model)


def test_tied_and_odd_layers():
    model, x = Odd(), torch.randn(3, 64)
    bias = model.second.bias.detach().clone()
    report = quantize(model, "int8-convrot", min_size=0)
    assert set(formats(model)) == {"first", "second", "third"}  # named_modules names a module once
    assert model.fourth is model.first and shared(model.second.weight, model.first.weight)
    torch.testing.assert_close(model.second(x) - bias, model.third(x))
    assert report["last"].reason == "kept: tied to table.weight"
    assert report["narrow"].reason == "kept: a rotation of 16 does not divide 40 inputs"
    assert report["attention.out_proj"].reason == "kept: a NonDynamicallyQuantizableLinear"
    assert report["second"].reason == report["fourth"].reason == "tied to first"
    first, second = report["first"], report["second"]
    assert first.bytes_before == 64 * 96 * 4 + 96 * 4 and second.bytes_before == second.bytes_after == 96 * 4
    assert report["fourth"].bytes_before == report["fourth"].bytes_after == 0


def test_refusals_leave_the_model_as_it_was():
    model = flux()
    with torch.no_grad():
        model.single_transformer_blocks[0].proj_out.weight[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"single_transformer_blocks.0.proj_out \(128, 640\) must be finite"):
        quantize(model, "int8")
    assert not formats(model)
    with pytest.raises(ValueError, match=r"method must be one of int8.*got 'int2'"):
        quantize(model, "int2")
    quantize(model, "int8", skip=["single_*"])
    with pytest.raises(ValueError, match=r"got transformer_blocks.0.attn.to_q in int8"):
        quantize(model, "w4a8")
    with pytest.raises(ValueError, match="a model with layers is required"):
        quantize(nn.Linear(64, 64), "int8")


class Accounting(TorchDispatchMode):
    """Bytes of the storages that ops make, while they live."""

    def __init__(self):
        self.live, self.peak, self.known = 0, 0, weakref.WeakSet()
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves(args)
            if isinstance(t, torch.Tensor)
        }
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size):
        self.live -= size


@pytest.mark.parametrize("method", ["int8", "int8-convrot", "fp8", "w4a16", "w4a8"])
def test_memory_beside_the_model_is_one_layer(method):
    layers = [nn.Linear(2048, 2048, dtype=torch.bfloat16) for _ in range(4)]
    model = nn.Sequential(*layers)
    float32 = 2048 * 2048 * 4
    del layers
    with Accounting() as memory:
        quantize(model, method)
    stored = sum(layer.nbytes for layer in model)
    assert memory.live <= stored * 1.01 + 4096
    assert memory.peak - stored * 3 / 4 <= float32 + stored / 4


@pytest.mark.parametrize("name", sorted(_TABLE))
def test_rules_name_layers_that_exist(name):
    """Every pattern of the table, by the layers of the model's smallest form."""
    small = {
        "FluxTransformer2DModel": {"num_layers": 1, "num_single_layers": 1},
        "Flux2Transformer2DModel": {"num_layers": 1, "num_single_layers": 1},
        "SD3Transformer2DModel": {"num_layers": 1},
        "QwenImageTransformer2DModel": {"num_layers": 1},
        "WanTransformer3DModel": {"num_layers": 1},
        "AuraFlowTransformer2DModel": {"num_mmdit_layers": 1, "num_single_dit_layers": 1},
        "Lumina2Transformer2DModel": {"num_layers": 1},
        "PixArtTransformer2DModel": {"num_layers": 1, "caption_channels": 64},
    }
    with torch.device("meta"):
        model = EmojiFlow() if name == "EmojiFlow" else getattr(diffusers, name)(**small[name])
    rules = rules_of(model)
    assert rules is _TABLE[name]
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for pattern in (*rules.keep, *rules.modulation):
        assert any(matches(n, (pattern,)) for n in linears), pattern
    left = [n for n in linears if not matches(n, (*rules.keep, *rules.modulation))]
    assert left and not any(word in n for n in left for word in ("norm", "mod", "adaln", "embed")), left
