"""`accelerate` and memory: graphs of the whole forward, blocks that come and go."""

import pytest
import torch
from diffusers.hooks import HookRegistry

import rfkernels
from rfkernels.integrations.accelerate import innermost
from rfkernels.memory import SimulatedBackend
from rfkernels.memory.plan import OVERHEAD
from tests.integrations.test_accelerate import CASE, INPUTS, Doubling, lora, run
from tests.memory.recorder import RecordingCapture
from tests.models.parity import error, models


@pytest.fixture
def model():
    with torch.no_grad():
        yield models(CASE)[0]


def test_layers_that_come_and_go(model):
    """Blocks streamed within a budget give the resident model's bits."""
    rfkernels.accelerate(model)
    expected = run(model)
    rfkernels.restore(model)
    values = {n: t.clone() for n, t in model.state_dict().items()}
    blocks = sum(t.nbytes for n, t in values.items() if "transformer_blocks" in n)
    rest = sum(t.nbytes for n, t in values.items() if "transformer_blocks" not in n)
    fixed = OVERHEAD + rest + 2 * 4608 * (2 * 72 + 72 + 432)
    backend = SimulatedBackend(rest + 7 * blocks // 10)
    rfkernels.accelerate(model, vram=fixed + 7 * blocks // 10, backend=backend)
    assert torch.equal(run(model), expected) and torch.equal(run(model), expected)
    row = rfkernels.explain(model)["models"][0]["rows"][-1]
    assert row["runs"] == "streamed" and " of 5 layers streamed" in row["what"]
    rfkernels.restore(model)
    assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())
    with pytest.raises(ValueError, match=r"vram must be more than [\d,]+ bytes, .* got 1,048,576"):
        rfkernels.accelerate(model, vram="1M")
    with pytest.raises(ValueError, match="graph must be 'auto' or a bool, got 'yes'"):
        rfkernels.accelerate(model, graph="yes")


def graphs(model) -> tuple[int, int]:
    """Graphs and replays of the model's forward."""
    found = innermost(model).runner.report().graphs
    return len(found), sum(hits for _, hits, _ in found)


def test_graphs(model):
    """One for each shape, made anew when the model changed."""
    rfkernels.accelerate(model, capture=RecordingCapture())
    expected = [model.eval() and run(model) for _ in range(3)]
    assert graphs(model) == (1, 3) and all(torch.equal(e, expected[0]) for e in expected)
    small = {k: v[:, :7] if k == "encoder_hidden_states" else v for k, v in INPUTS.items()}
    model(**small | {"txt_ids": INPUTS["txt_ids"][:7]}, return_dict=False)
    assert graphs(model)[0] == 2
    assert "2 graphs" in innermost(model).report()
    rfkernels.load_lora(model, {k.removeprefix("transformer."): v for k, v in lora(1).items()})
    changed = run(model)
    assert graphs(model) == (1, 1) and error(changed, expected[0]) > 0.1
    rfkernels.set_adapters(model, "adapter_0", 0.0)  # written to the device: the graph sees it
    assert error(run(model), expected[0]) < 4e-6 and graphs(model) == (1, 2)
    model.load_state_dict({n: 0 * t for n, t in model.state_dict().items()})
    assert not run(model).any() and graphs(model) == (1, 3)
    rfkernels.restore(model)
    assert "forward" not in model.__dict__


def test_no_graph_where_python_decides(model):
    rfkernels.accelerate(model, capture=RecordingCapture())
    expected = run(model)
    HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[1]).register_hook(Doubling(), "hook")
    assert error(run(model), expected) > 0.01 and "hooks" in innermost(model).report()
    model.transformer_blocks[1]._diffusers_hook.remove_hook("hook")
    assert torch.equal(run(model), expected)
    hook = model.transformer_blocks[1].attn.to_v.register_forward_hook(lambda module, args, out: 2 * out)
    assert error(run(model), expected) > 0.01 and "hooks" in innermost(model).report()
    hook.remove()
    assert torch.equal(run(model), expected)
    model.load_lora_adapter(lora(0), adapter_name="style")
    assert error(run(model), expected) > 0.01 and "adapters of peft" in innermost(model).report()
    model.delete_adapters("style")
    rfkernels.restore(model)
    rfkernels.accelerate(model, graph=False, capture=RecordingCapture())
    assert not hasattr(innermost(model), "runner")
