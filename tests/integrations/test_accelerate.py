"""One line for a model of diffusers: the same results, hooks, adapters and names; undone bit by bit."""

import copy
import json
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

import rfkernels
from rfkernels import ops
from rfkernels.integrations.accelerate import accelerated
from rfkernels.nn import QuantLinear
from tests.models.cases.flux import CASES
from tests.models.parity import error, models

pytestmark = pytest.mark.usefixtures("no_grad")
CASE = CASES[1]  # with guidance
INPUTS = CASE.inputs()


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> FluxTransformer2DModel:
    return models(CASE)[0]


def run(model: nn.Module, **options) -> torch.Tensor:
    return model(**INPUTS, **options, return_dict=False)[0]


def calls(model: nn.Module) -> list[int]:
    return [site.calls for site in accelerated(model).sites.values()]


def own_attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(module.__dict__) for name, module in model.named_modules()}


def test_same_result_and_every_bit_back(model):
    expected, attributes, names = run(model), own_attributes(model), list(model.state_dict())
    processors = list(model.attn_processors.values())
    parameters = list(model.parameters())
    assert rfkernels.accelerate(model) is model
    result = run(model)
    assert error(result, expected) <= 4e-6 and not torch.equal(result, expected)
    assert calls(model) == [1] * 5
    assert list(model.state_dict()) == names
    assert rfkernels.restore(model) is model
    assert torch.equal(run(model), expected)
    assert own_attributes(model) == attributes
    assert all(a is b for a, b in zip(processors, model.attn_processors.values(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_quantised_and_every_bit_back(model):
    expected, modules = run(model), dict(model.named_modules())
    rfkernels.accelerate(model, quant={"method": "int8", "min_size": 0})
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 39
    assert 1e-4 < error(run(model), expected) < 0.05
    rfkernels.restore(model)
    assert all(m is modules[n] for n, m in model.named_modules())
    assert torch.equal(run(model), expected)


def test_quantised_regions_are_the_ops_one_after_the_other(model):
    """Tokens become codes once, in the norm; gates and residuals go into the epilogue."""
    options = {"method": "int8", "min_size": 0}
    alone = copy.deepcopy(model)
    rfkernels.quantize(alone, **{k: v for k, v in options.items() if k != "method"}, method="int8")
    rfkernels.accelerate(model, quant=options, attention="full")
    regions = ("norm_modulate_quantize", "gated_residual_norm_modulate_quantize")
    with ExitStack() as stack:
        spies = [stack.enter_context(mock.patch.object(ops, r, wraps=getattr(ops, r))) for r in regions]
        result = run(model)
    assert [spy.call_count for spy in spies] == [2 * 2 + 3, 2 * 2]
    assert error(result, run(alone)) < 5e-3


@pytest.mark.parametrize("reversible", [True, False])
def test_quantised_where_no_layer_is_large_enough(model, reversible):
    rfkernels.accelerate(model, quant={"method": "int8", "min_size": 10**9}, reversible=reversible)
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    rfkernels.restore(model)


def test_layers_that_are_not_kept_cannot_come_back(model):
    rfkernels.accelerate(model, quant={"method": "int8", "min_size": 0}, reversible=False)
    with pytest.raises(ValueError, match="reversible=False are gone"):
        rfkernels.restore(model)
    assert accelerated(model) is not None


class Doubling(ModelHook):
    """Doubles the image tokens that go in; `post_forward` halves what comes out."""

    def pre_forward(self, module, *args, **kwargs):
        return args, kwargs | {"hidden_states": 2 * kwargs["hidden_states"]}

    def post_forward(self, module, output):
        return output[0], output[1] / 2


class Skipping(ModelHook):
    """One that takes the place of the forward, as caches do."""

    def new_forward(self, module, *args, **kwargs):
        return self.fn_ref.original_forward(*args, **kwargs)


@pytest.mark.parametrize("hook", [Doubling, Skipping])
@pytest.mark.parametrize("first", ["hook", "accelerate"])
def test_hooks_of_diffusers(model, hook, first):
    block = model.transformer_blocks[1]

    def add_hook():
        HookRegistry.check_if_exists_or_initialize(block).register_hook(hook(), "a hook")

    plain = run(model)
    add_hook()
    expected = run(model)
    assert (error(expected, plain) > 0.01) == (hook is Doubling)
    if first == "hook":
        rfkernels.accelerate(model)
    else:
        block._diffusers_hook.remove_hook("a hook")
        rfkernels.accelerate(model)
        add_hook()
    assert error(run(model), expected) <= 4e-6 and calls(model) == [1] * 5
    rfkernels.restore(model)
    assert torch.equal(run(model), expected)
    block._diffusers_hook.remove_hook("a hook")
    assert torch.equal(run(model), plain)


def test_hooks_of_accelerate(model):
    from accelerate.hooks import ModelHook as Hook
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    expected, seen = run(model), []

    class Counting(Hook):
        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    block = model.single_transformer_blocks[0]
    add_hook_to_module(block, Counting())
    rfkernels.accelerate(model)
    assert error(run(model), expected) <= 4e-6
    assert seen == [block] and calls(model) == [1] * 5
    rfkernels.restore(model)
    assert torch.equal(run(model), expected) and len(seen) == 2
    remove_hook_from_module(block)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("name", ["attn.to_q", "ff.net.0.proj", "ff.net.2", "attn", "ff_context", "norm2"])
@pytest.mark.parametrize("quant", [None, {"method": "int8", "min_size": 0}])
def test_hooks_inside_a_block(model, name, quant):
    """On a layer they run; on a module that ours does not call, the block's own forward runs."""
    rfkernels.accelerate(model, quant, attention="full")
    plain = run(model)
    seen = []
    module = model.transformer_blocks[1].get_submodule(name)
    module.register_forward_pre_hook(lambda module, args: seen.append(args))
    result = run(model)
    assert len(seen) == 1 and error(result, plain) < (4e-6 if quant is None else 5e-3)
    site = accelerated(model).sites["transformer_blocks.1"]
    assert (site.calls == 2) == hasattr(module, "in_features")
    assert ("has a hook" in str(rfkernels.explain(model))) == (site.calls == 1)


def test_processor_that_comes_later(model):
    class Mine(type(model.transformer_blocks[0].attn.processor)):
        pass

    rfkernels.accelerate(model)
    model.transformer_blocks[0].attn.set_processor(Mine())
    model.transformer_blocks[1].attn.processor._parallel_config = "a config"
    with pytest.raises(ValueError, match="a parallel_config"):  # of our attention in diffusers' own forward
        run(model)
    assert calls(model) == [0, 0, 0, 0, 0]
    model.transformer_blocks[1].attn.processor._parallel_config = None
    run(model)
    assert calls(model) == [0, 1, 1, 1, 1]
    text = str(rfkernels.explain(model))
    assert "processor is another since accelerate" in text and "in parallel with other devices" in text


def test_weights_that_hooks_bring_layer_by_layer(model, monkeypatch):
    """Blocks whose weights lie elsewhere when they begin run their own forward."""
    rfkernels.accelerate(model)
    block = model.transformer_blocks[0]
    site = accelerated(model).sites["transformer_blocks.0"]
    monkeypatch.setattr(site, "block", copy.deepcopy(block).to("meta"))
    run(model)
    assert site.calls == 0 and list(site.declined) == [
        "weights on meta, tokens on cpu: offloaded layer by layer"
    ]
    assert "offload whole blocks" in str(rfkernels.explain(model))


def lora(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layers = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_out")
    sizes = ((72, 72), (72, 360))
    made = {}
    for layer, (out, width) in zip(layers, sizes, strict=True):
        made[f"transformer.{layer}.lora_A.weight"] = torch.randn(4, width, generator=generator)
        made[f"transformer.{layer}.lora_B.weight"] = torch.randn(out, 4, generator=generator)
    return made


def test_adapters_of_peft(model):
    plain = run(model)
    rfkernels.accelerate(model)
    model.load_lora_adapter(lora(0), adapter_name="style")
    result = run(model)
    assert calls(model) == [1] * 5
    assert "peft" in str(rfkernels.explain(model))
    rfkernels.restore(model)
    expected = run(model)
    assert error(result, expected) <= 4e-6 and error(expected, plain) > 0.01


@pytest.mark.parametrize("quant", [None, {"method": "int8", "min_size": 0}])
def test_own_adapters(model, quant):
    plain = run(model)
    tensors = {k.removeprefix("transformer."): v for k, v in lora(1).items()}
    rfkernels.accelerate(model, quant, lora=tensors)
    result = run(model)
    assert error(result, plain) > 0.1
    assert "beside 2 layers, in the epilogue" in str(rfkernels.explain(model))
    rfkernels.restore(model)
    assert torch.equal(run(model), plain)
    model.load_lora_adapter(lora(1), adapter_name="style")
    assert error(result, run(model)) <= (4e-6 if quant is None else 0.05)


def test_several_adapters_by_name(model):
    stripped = ({k.removeprefix("transformer."): v for k, v in lora(i).items()} for i in (1, 2))
    plain = run(model)
    rfkernels.accelerate(model, lora=dict(zip(("a", "b"), stripped, strict=True)))
    both = run(model)
    rfkernels.set_adapters(model, ["a"], [1.0])
    assert error(run(model), both) > 0.01
    rfkernels.restore(model)
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("quant", [None, {"method": "int8", "min_size": 0}])
def test_adapters_that_came_later(model, quant):
    """They stay, but for those whose layers go."""
    plain = run(model)
    first, later = ({k.removeprefix("transformer."): v for k, v in lora(i).items()} for i in (1, 2))
    rfkernels.accelerate(model, quant, lora={"first": first})
    rfkernels.load_lora(model, later, name="later")
    rfkernels.restore(model)
    if quant is None:
        assert error(run(model), plain) > 0.01
        rfkernels.unload_lora(model)
    assert torch.equal(run(model), plain)


def test_what_a_block_does_not_cover(model):
    """An argument of another processor: diffusers' own forward runs, and says why."""
    expected = run(model)
    rfkernels.accelerate(model)
    assert error(run(model, joint_attention_kwargs={"ip_hidden_states": []}), expected) <= 4e-6
    assert calls(model) == [0] * 5
    text = str(rfkernels.explain(model))
    assert "joint_attention_kwargs (ip_hidden_states) was given" in text and "leave the argument out" in text


def test_processors_of_somebody_else(model):
    class Mine(type(model.transformer_blocks[0].attn.processor)):
        pass

    model.transformer_blocks[0].attn.set_processor(Mine())
    expected = run(model)
    rfkernels.accelerate(model)
    assert error(run(model), expected) <= 4e-6 and calls(model) == [0, 1, 1, 1, 1]
    rows = rfkernels.explain(model)["models"][0]["rows"]
    assert rows[0]["runs"] == "diffusers" and "attn.processor is Mine" in rows[0]["what"]


def test_gradients(model):
    model.requires_grad_(True)
    with torch.enable_grad():
        run(model).square().sum().backward()
        expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        rfkernels.accelerate(model)
        run(model).square().sum().backward()
    assert expected.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    assert max(error(p.grad, expected[n]) for n, p in model.named_parameters() if n in expected) < 1e-4


def test_gradients_of_modulation_beside_quantised_layers(model):
    """Codes have none: they are not made where scales and shifts are trained."""
    layer = model.transformer_blocks[0].norm1.linear.requires_grad_(True)
    with torch.enable_grad():
        run(model).square().sum().backward()
        expected = layer.weight.grad.clone()
        layer.zero_grad()
        rfkernels.accelerate(model, quant={"method": "int8", "min_size": 0}, attention="full")
        run(model).square().sum().backward()
    for ours, theirs in zip(layer.weight.grad.chunk(6), expected.chunk(6), strict=True):
        assert error(ours, theirs) < 0.2


def test_float16_residuals_are_bounded():
    """As in diffusers, whose blocks clip them."""
    theirs, _ = models(CASE, torch.float16)
    theirs.transformer_blocks[0].ff_context.net[2].bias.fill_(6e4)
    theirs.transformer_blocks[0].norm1_context.linear.bias.fill_(2.0)
    inputs = {k: v.half() if v.ndim > 1 and "ids" not in k else v for k, v in INPUTS.items()}
    expected = theirs(**inputs, return_dict=False)[0]
    rfkernels.accelerate(theirs)
    result = theirs(**inputs, return_dict=False)[0]
    assert result.isfinite().all() and error(result, expected) < 0.02


def test_report(model):
    before = rfkernels.explain(model)
    assert not before["models"][0]["accelerated"] and "rfkernels.accelerate(...)" in str(before)
    rfkernels.accelerate(model)
    run(model)
    report = rfkernels.explain(model)
    assert json.loads(json.dumps(report)) == dict(report)
    rows = {row["region"]: row for row in report["models"][0]["rows"]}
    assert "2 calls on cpu" in rows["transformer_blocks.0-1"]["runs"]
    assert "qkv_norm_rope" in rows["single_transformer_blocks.0-2"]["what"]
    assert rows["attention"]["what"] == "precision full"
    assert rows["linear layers"]["what"].endswith("of float32: torch")
    assert "CUDA graphs need CUDA" in rows["graph"]["what"]


def test_report_of_our_own_model():
    rows = rfkernels.explain(models(CASE)[1])["models"][0]["rows"]
    assert rows[0]["what"] == "a model of rfkernels" and "C++" in rows[0]["runs"]


def test_refusals(model):
    attributes = own_attributes(model)
    with pytest.raises(TypeError, match="pipeline or transformer is required, got dict"):
        rfkernels.accelerate({})
    with pytest.raises(ValueError, match=r"Linear has no known block; known are .*FluxTransformerBlock"):
        rfkernels.accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"attention must be one of auto, full, .* got 'int4'"):
        rfkernels.accelerate(model, attention="int4")
    with pytest.raises(ValueError, match="method must be one of int8"):
        rfkernels.accelerate(model, "int3")
    with pytest.raises(ValueError, match="must have 'method'"):
        rfkernels.accelerate(model, {"group": 64})
    with pytest.raises(ValueError, match="keys mean nothing"):
        rfkernels.accelerate(model, {"method": "int8", "min_size": 0}, lora={"what": torch.zeros(1)})
    assert own_attributes(model) == attributes
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    rfkernels.accelerate(model)
    with pytest.raises(ValueError, match="is accelerated; restore it first"):
        rfkernels.accelerate(model)
    with pytest.raises(TypeError, match="a pipeline or a model is required, got int"):
        rfkernels.explain(3)
