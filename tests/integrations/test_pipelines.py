"""Whole pipelines of diffusers, text to picture: accelerated, quantised, with adapters, and as before."""

import functools

import pytest
import torch

import rfkernels
from rfkernels.integrations.accelerate import accelerated
from rfkernels.integrations.schedulers import FlowScheduler
from rfkernels.nn import QuantLinear
from tests.integrations.pipelines import PIPELINES, image


def differ(a: torch.Tensor, b: torch.Tensor, name: str) -> float:
    """The largest difference; the mean one of HiDream, where a rounding may choose another expert."""
    return float((a - b).abs().mean() if name == "hidream" else (a - b).abs().max())


every_pipeline = pytest.mark.parametrize("name", PIPELINES)


@functools.cache
def built(name: str):
    torch.manual_seed(0)
    return PIPELINES[name][0]()


@functools.cache
def plain(name: str) -> torch.Tensor:
    return image(built(name), PIPELINES[name][1])


@pytest.fixture
def pipe(name):
    yield built(name)
    rfkernels.restore(built(name))
    assert torch.equal(image(built(name), PIPELINES[name][1]), plain(name))  # every bit is back


@every_pipeline
def test_accelerated(name, pipe):
    expected = plain(name)
    assert expected.std() > 0.05 and expected.min() >= 0 and expected.max() <= 1
    assert rfkernels.accelerate(pipe) is pipe
    assert differ(image(pipe, PIPELINES[name][1]), expected, name) < 1e-4
    sites = accelerated(pipe.transformer).sites
    assert all(site.refusal is None and site.calls >= 4 and not site.declined for site in sites.values())
    assert f"transformer: {type(pipe.transformer).__name__}" in str(rfkernels.explain(pipe))


@every_pipeline
def test_quantised(name, pipe):
    rfkernels.accelerate(pipe, quant={"method": "int8", "min_size": 0})
    assert sum(isinstance(m, QuantLinear) for m in pipe.transformer.modules()) > 10
    difference = (image(pipe, PIPELINES[name][1]) - plain(name)).abs().mean()
    assert 1e-6 < difference < 0.02


@every_pipeline
def test_our_scheduler(name, pipe):
    own = pipe.scheduler
    pipe.scheduler = FlowScheduler.from_config(own.config, compat="diffusers")
    try:
        rfkernels.accelerate(pipe)
        assert differ(image(pipe, PIPELINES[name][1]), plain(name), name) < 1e-4
    finally:
        pipe.scheduler = own


LAYERS = {
    "flux": ("transformer_blocks.0.attn.to_k", "single_transformer_blocks.1.proj_mlp"),
    "sd3": ("transformer_blocks.1.attn.add_q_proj", "transformer_blocks.0.ff.net.2"),
    "wan": ("blocks.0.attn1.to_q", "blocks.1.ffn.net.0.proj"),
    "hidream": ("double_stream_blocks.0.block.attn1.to_q", "single_stream_blocks.1.block.attn1.to_out"),
}


def lora(model: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = {}
    for path in LAYERS[name]:
        layer = model.get_submodule(path)
        down, up = (
            torch.randn(4, layer.in_features, generator=generator),
            torch.randn(layer.out_features, 4, generator=generator),
        )
        made |= {f"transformer.{path}.lora_A.weight": down, f"transformer.{path}.lora_B.weight": up}
    return made


@every_pipeline
def test_adapters_through_the_pipeline(name, pipe):
    """`load_lora_weights` before or after, with the effect that it has without us."""
    options = PIPELINES[name][1]
    try:
        pipe.load_lora_weights(lora(pipe.transformer, name), adapter_name="style")
        expected = image(pipe, options)
        assert (expected - plain(name)).abs().mean() > 1e-3
        rfkernels.accelerate(pipe)
        assert differ(image(pipe, options), expected, name) < 1e-4
        pipe.unload_lora_weights()
        assert differ(image(pipe, options), plain(name), name) < 1e-4
        pipe.load_lora_weights(lora(pipe.transformer, name), adapter_name="style")
        assert differ(image(pipe, options), expected, name) < 1e-4
    finally:
        pipe.unload_lora_weights()


@every_pipeline
def test_own_adapters_on_quantised_layers(name, pipe):
    tensors = {k.removeprefix("transformer."): v for k, v in lora(pipe.transformer, name).items()}
    pipe.load_lora_weights(lora(pipe.transformer, name), adapter_name="style")
    expected = image(pipe, PIPELINES[name][1])
    pipe.unload_lora_weights()
    rfkernels.accelerate(pipe, quant={"method": "int8", "min_size": 0}, lora=tensors)
    difference = (image(pipe, PIPELINES[name][1]) - expected).abs().mean()
    assert difference < 0.03 and difference < (expected - plain(name)).abs().mean() / 2
