import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rfkernels.models.checkpoint import WeightsError, dequantise, quantise, read_record, write_emoji
from rfkernels.models.emoji import DEFAULT_WEIGHTS, EmojiConfig, load_emoji
from tests.tiny import CONFIG, tiny_model

MIDDLE = EmojiConfig(**{**CONFIG.__dict__, "table": 512})  # its table is large enough to be quantised


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "tiny.safetensors"
    write_emoji(tiny_model(config=MIDDLE), path, {"steps_done": 3})
    return path


def rewrite(path, change_tensors=None, change_metadata=None):
    """Saves the file again after changes to its parts."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for change, part in ((change_tensors, tensors), (change_metadata, metadata)):
        if change:
            change(part)
    save_file(tensors, path, metadata)


def test_quantised_rows_are_within_half_a_step():
    torch.manual_seed(0)
    w = torch.randn(64, 100) * torch.logspace(-6, 6, 64)[:, None]
    w[7] = 0
    q, scale = quantise(w)
    assert q.dtype == torch.int8 and q.abs().max() == 127
    assert ((dequantise(q, scale) - w).abs() <= 0.5001 * scale[:, None]).all()


def test_written_model_reads_back(weights):
    model, again = tiny_model(config=MIDDLE), load_emoji(weights)
    assert again.config == MIDDLE and not again.training
    assert again.encode(["red qwerty"]).unknown == [["qwerty"]]
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        step = p.abs().amax() / 127 if p.ndim == 2 else p.abs().amax() / 1024
        assert (p - q).abs().max() <= step, name
    x = torch.randn(2, 4, 16, 16)
    sigma = torch.tensor([0.9, 0.4])
    a, b = (m(x, sigma, m.encode(["red heart", ""])) for m in (model, again))
    assert (a - b).square().mean().sqrt() < 0.05 * a.std()
    bf16 = load_emoji(weights, dtype=torch.bfloat16)
    assert bf16.dtype == torch.bfloat16 and bf16.rotation.dtype == torch.float32


def test_record_tells_how_it_was_made(weights):
    record = read_record(weights)
    assert record["training"] == {"steps_done": 3}
    assert record["config"]["table"] == 512 and "MIT" in record["licence"]


def _architecture(**change):
    return lambda m: m.update(architecture=json.dumps({**json.loads(m["architecture"]), **change}))


FAULTS = {
    "missing tensor": (lambda t: t.pop("out.weight"), None, "missing"),
    "missing scale": (lambda t: t.pop("text.table.scale"), None, "scale"),
    "foreign tensor": (lambda t: t.update(extra=torch.zeros(1)), None, "unknown to this model"),
    "wrong shape": (lambda t: t.update({"out.bias": torch.zeros(3)}), None, r"out.bias must be \[64\]"),
    "wrong type": (
        lambda t: t.update({"out.bias": torch.zeros(64, dtype=torch.int64)}),
        None,
        "out.bias must be",
    ),
    "not finite": (lambda t: t["out.bias"].fill_(float("nan")), None, "finite"),
    "bad scale": (lambda t: t["text.table.scale"].fill_(float("inf")), None, "finite"),
    "words": (lambda t: t.update(known_words=torch.zeros(3)), None, "known_words"),
    "foreign format": (None, lambda m: m.update(format="other"), "format"),
    "later version": (None, lambda m: m.update(version="99"), "version"),
    "no architecture": (None, lambda m: m.pop("architecture"), "architecture"),
    "architecture not JSON": (None, lambda m: m.update(architecture="{"), "architecture"),
    "unknown field": (None, _architecture(depth=3), "architecture"),
    "huge": (None, _architecture(width=10**9), "architecture"),
    "zero": (None, _architecture(patch=0), "architecture"),
    "uneven": (None, _architecture(patch=5), "architecture"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_file_is_refused_in_one_line(weights, fault):
    change_tensors, change_metadata, message = FAULTS[fault]
    rewrite(weights, change_tensors, change_metadata)
    with pytest.raises(WeightsError, match=message) as caught:
        load_emoji(weights)
    assert "\n" not in str(caught.value) and "reinstall" in str(caught.value)


@pytest.mark.parametrize("kept", [0, 5, 100, 5000])
def test_truncated_file_is_refused(weights, kept):
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(WeightsError, match="not readable as safetensors"):
        load_emoji(weights)


def test_foreign_files_are_refused(tmp_path):
    (tmp_path / "text").write_text("hello, this is no weights file at all")
    save_file({"x": torch.zeros(2)}, tmp_path / "plain.safetensors")
    for name, message in (
        ("text", "safetensors"),
        ("plain.safetensors", "format"),
        ("none", "not found"),
        (".", "folder"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_emoji(tmp_path / name)


def test_shipped_weights_are_small_and_know_their_words():
    assert DEFAULT_WEIGHTS.stat().st_size <= 16e6
    model = load_emoji()
    assert model.config.size == 128 and {"noto", "flat", "3d"} < set(model.config.styles)
    prompt = "a red heart noto emoji on a yellow background"
    assert model.encode([prompt, "zyxwv"]).unknown == [[], ["zyxwv"]]
    assert {"noto", "training", "licence"} - set(read_record(DEFAULT_WEIGHTS)) == {"noto"}
