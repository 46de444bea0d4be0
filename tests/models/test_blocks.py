"""The embedded model on the ops, beside its definition in plain torch."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import rfkernels
from rfkernels.memory import GraphRunner
from rfkernels.models import blocks, emoji
from rfkernels.models.blocks import as_halves, rope_table, sinusoid
from rfkernels.models.checkpoint import read_emoji, write_emoji
from rfkernels.models.emoji import EmojiFlow
from tests.memory.recorder import Ops, RecordingCapture
from tests.models import plain_emoji
from tests.tiny import CONFIG, tiny_model

SHAPE = replace(CONFIG, width=128, heads=2, double_blocks=2, single_blocks=2)
PROMPTS = ["a red heart on a blue background", "", "cat"]


def model_of(dtype: torch.dtype = torch.float32, **changes) -> EmojiFlow:
    return tiny_model(config=replace(SHAPE, **changes)).to(dtype).requires_grad_(True)


def inputs(model: EmojiFlow, prompts: list[str] = PROMPTS) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 16, 16, generator=g)[: len(prompts)].to(model.dtype)
    text = model.encode(prompts)
    return x, torch.tensor([0.9, 0.3, 0.01])[: len(prompts)], text.rows, text.weights, text.mask


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).double().norm() / expected.double().norm().clamp(min=1e-30)).item()


def gradients(model: EmojiFlow, picture: torch.Tensor) -> dict[str, torch.Tensor]:
    target = torch.randn(picture.shape, generator=torch.Generator().manual_seed(2)).to(picture.dtype)
    names, values = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((picture * target).sum(), values), strict=True))


@pytest.fixture(params=["fused", "plain"])
def kit(request, monkeypatch) -> str:
    """What a gradient is recorded through."""
    kits = {"fused": blocks.FUSED, "plain": blocks.PLAIN}
    for module in (blocks, emoji):
        monkeypatch.setattr(module, "kit_of", lambda x: kits[request.param])
    return request.param


@pytest.mark.parametrize("heads, dtype, tolerance", [(2, torch.float64, 1e-7), (8, torch.float32, 1e-5)])
def test_pictures_and_gradients_are_those_of_plain_torch(kit, heads, dtype, tolerance):
    model = model_of(dtype, heads=heads)
    picture, expected = model.predict(*inputs(model)), plain_emoji.predict(model, *inputs(model))
    assert relative(picture, expected) < tolerance
    got, wanted = gradients(model, picture), gradients(model, expected)
    wrong = {n: e for n in got if (e := relative(got[n], wanted[n])) > 10 * tolerance}
    assert not wrong


def test_gradients_of_master_weights_under_autocast(kit):
    model = model_of()
    exact = gradients(model, plain_emoji.predict(model, *inputs(model)))
    with torch.autocast("cpu", torch.bfloat16):
        picture = model.predict(*inputs(model))
    got = gradients(model, picture.float())
    assert picture.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in got.values())
    wrong = {n: e for n in got if (e := relative(got[n], exact[n])) > 0.1}
    assert not wrong


def test_kits_are_chosen_by_device_and_gradient():
    x = torch.zeros(1)
    assert blocks.kit_of(x) is blocks.PLAIN and blocks.kit_of(x.to("meta")) is blocks.FUSED
    with torch.no_grad():
        assert blocks.kit_of(x) is blocks.FUSED


def test_predict_is_one_graph(kit):
    model = model_of()
    compiled = torch.compile(model.predict, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs(model)), model.predict(*inputs(model)))


@torch.no_grad()
def test_padding_changes_nothing():
    model = model_of()
    together = model.predict(*inputs(model))
    x, sigma, *text = inputs(model)
    for i, prompt in enumerate(PROMPTS):
        alone = model.encode([prompt])
        got = model.predict(x[i : i + 1], sigma[i : i + 1], alone.rows, alone.weights, alone.mask)
        assert relative(got, together[i : i + 1]) < 1e-5
    longer = [torch.nn.functional.pad(t, (0, 0) * (t.ndim - 2) + (0, 5)) for t in text]
    assert relative(model.predict(x, sigma, *longer), together) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("format", ["int8", "int8-convrot", "w4a16"])
def test_quantised_layers_run_through_their_kernels(format):
    model = model_of(width=256, heads=4)
    expected = model.predict(*inputs(model))
    rfkernels.quantize(model, format)
    with Ops() as ops:
        got = model.predict(*inputs(model))
    ran = Counter(str(call[0]).removeprefix("rfkernels.") for call in ops.calls)
    assert relative(got, expected) < (0.4 if format == "w4a16" else 0.05)
    coded = format != "w4a16"
    assert ran["norm_modulate_quantize_out.default"] == (6 if coded else 0)
    assert ran["gated_residual_norm_modulate_quantize_out.default"] == (4 if coded else 0)
    assert ran["attention_out.default"] == 4 and ran["qkv_norm_rope_out.default"] == 4
    assert ran["linear_out.default"] == 20


@torch.no_grad()
def test_a_step_is_replayed_as_a_graph():
    model = model_of()
    run = GraphRunner(model.velocity, capture=RecordingCapture())
    for seed in range(3):
        x, sigma, rows, weights, mask = inputs(model, [PROMPTS[seed], "a cat", "a b c d e f g"])
        args = (x + seed, sigma / (1 + seed), rows, weights, mask)
        assert torch.equal(run(*args), model.velocity(*args))
    ((_, replays, _),) = run.report().graphs
    assert replays == 3 and not run.report().eager


def test_checkpoints_have_halves_and_parameters_neighbours(tmp_path):
    model, other = model_of(heads=2), model_of(heads=2)
    state, inner = model.state_dict(), dict(model.named_parameters())
    for name in ("double_blocks.0.text.qkv.weight", "single_blocks.1.qkv_up.weight"):
        w, of_file, d = inner[name], state[name], model.head_dim
        assert torch.equal(of_file[d + 5], w[d + 10]) and torch.equal(of_file[d + d // 2 + 5], w[d + 11])
        assert torch.equal(of_file[2 * SHAPE.width :], w[2 * SHAPE.width :])
    gain = "single_blocks.0.norm.k"
    assert torch.equal(state[gain], torch.cat([inner[gain][::2], inner[gain][1::2]]))
    other.load_state_dict(state)
    assert all(torch.equal(p, inner[n]) for n, p in other.named_parameters())
    both = torch.nn.ModuleList([model, other]).state_dict()
    assert all(torch.equal(both[f"{i}.{n}"], t) for n, t in state.items() for i in (0, 1))
    write_emoji(model, tmp_path / "a", {})
    assert torch.equal(load_file(tmp_path / "a")[gain], state[gain].half())
    again = read_emoji(tmp_path / "a", device=torch.device("cpu"), dtype=torch.float32)
    wrong = {n: e for n, p in again.named_parameters() if (e := relative(p, inner[n])) > 0.02}
    assert not wrong


def test_quantised_states_are_reordered_with_their_scales():
    model, other = model_of(), model_of()
    for m in (model, other):
        rfkernels.quantize(m, "int8", min_size=1)
    name = "double_blocks.0.image.qkv"
    state, layer = model.state_dict(), model.get_submodule(name)
    numbers = layer.dequantized()
    halves = as_halves({f"{name}.weight": numbers}, SHAPE.width, model.head_dim)[f"{name}.weight"]
    assert torch.equal(state[f"{name}.weight"] * state[f"{name}.weight_scale"][:, None], halves)
    other.load_state_dict(state)
    assert torch.equal(other.get_submodule(name).weight, layer.weight)


def test_rotation_keeps_length_and_sees_offsets_only():
    table = torch.view_as_complex(rope_table(4, 64).double()).view(4, 4, 32)
    torch.testing.assert_close(table.abs(), torch.ones_like(table.abs()), rtol=1e-6, atol=0)
    apart = table[0, 0] * table[2, 1].conj()
    torch.testing.assert_close(apart, table[1, 2] * table[3, 3].conj(), rtol=1e-5, atol=1e-5)
    assert (apart - table[0, 0] * table[1, 2].conj()).abs().max() > 1e-3  # rows are not columns


@pytest.mark.parametrize("width", [64, 256])
def test_sinusoid_tells_noise_levels_apart(width):
    table = sinusoid(torch.tensor([0.0, 0.001, 0.5, 1.0]), width)
    assert table.shape == (4, width) and table.dtype == torch.float32
    assert torch.cdist(table, table).add(torch.eye(4) * 9).min() > 0.5
