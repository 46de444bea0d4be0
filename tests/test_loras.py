"""LoRAs of a pipeline: switched between calls, on a model that no call changes."""

import json
import threading

import pytest
import torch
from safetensors.torch import save_file

from rfkernels import loras
from rfkernels.pipeline import InputError, Pipeline
from tests.tiny import tiny_model

LAYERS = ("double_blocks.0.image.qkv", "single_blocks.0.proj_down", "text.out")


def write_lora(path, seed: int, layers=LAYERS) -> None:
    model, tensors = tiny_model(), {}
    torch.manual_seed(seed)
    for name in layers:
        out, into = model.get_submodule(name).weight.shape
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, into) * into**-0.5
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, 2) * 0.5
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A package with the LoRAs "pixel" and "glow", and one for few steps."""
    for seed, name in enumerate(("lora-pixel", "lora-glow", "emoji-few")):
        write_lora(tmp_path / f"{name}.safetensors", seed + 1)
    monkeypatch.setattr(loras, "FOLDER", tmp_path)
    return tmp_path


def make(**options) -> Pipeline:
    return Pipeline("emoji", tiny_model(), torch.device("cpu"), torch.float32, "0" * 64, 0.0, **options)


def picture(pipe: Pipeline, **options) -> bytes:
    return pipe("red heart", steps=options.pop("steps", 3), seed=4, **options).images[0].tobytes()


def test_a_lora_by_name_by_file_and_merged_into_the_weights_are_the_same_picture(folder):
    pipe, file = make(), folder / "lora-pixel.safetensors"
    plain = picture(pipe)
    named = picture(pipe, lora="pixel")
    assert named != plain and named == picture(make(), lora={str(file): 1.0})
    merged = tiny_model()
    tensors = {name: t.double() for name, t in loras_of(file).items()}
    for name in LAYERS:
        layer = merged.get_submodule(name)
        delta = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        layer.weight.data = (layer.weight.double() + 0.5 * delta).float()
    expected = Pipeline("emoji", merged, torch.device("cpu"), torch.float32, "", 0.0)
    half, truth = picture(pipe, lora={"pixel": 0.5}), picture(expected)
    assert max(abs(a - b) for a, b in zip(half, truth, strict=True)) <= 2 and half != plain


def loras_of(file):
    from safetensors.torch import load_file

    return load_file(file)


def test_loras_are_switched_between_calls_and_leave_the_model_alone(folder):
    pipe = make()
    before = {name: p.clone() for name, p in pipe.model.state_dict().items()}
    plain, pixel, glow = picture(pipe), picture(pipe, lora="pixel"), picture(pipe, lora="glow")
    both = picture(pipe, lora={"pixel": 1.0, "glow": 1.0})
    assert len({plain, pixel, glow, both}) == 4
    assert (picture(pipe, lora="pixel"), picture(pipe)) == (pixel, plain)
    assert picture(pipe, lora={"pixel": 1.0, "glow": 0.0}) == pixel
    assert all(torch.equal(p, before[name]) for name, p in pipe.model.state_dict().items())
    shared = {p.data_ptr() for p in pipe.model.parameters()}
    assert shared <= {p.data_ptr() for p in pipe.rack._model.parameters()}


def test_threads_with_and_without_loras_get_their_own_pictures(folder):
    pipe = make()
    kinds = [None, "pixel", {"glow": 0.5}, ["pixel", "glow"]] * 3
    alone = [picture(pipe, lora=kind) for kind in kinds]
    found: dict[int, bytes] = {}
    draw = lambda i: found.__setitem__(i, picture(pipe, lora=kinds[i]))
    workers = [threading.Thread(target=draw, args=(i,)) for i in range(len(kinds))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [found[i] for i in range(len(kinds))] == alone


def test_what_was_on_is_recorded(folder):
    parameters = json.loads(json.dumps(make()("red heart", steps=1, lora={"glow": 0.5}).parameters))
    assert parameters["lora"] == {"glow": 0.5} and parameters["few"] is False
    assert list(parameters["lora_files"]) == ["glow"]
    assert len(parameters["lora_files"]["glow"]) == len("sha256:") + 64


def test_few_steps_use_their_adapter_without_guidance_unless_told_otherwise(folder):
    pipe = make(few=folder / "emoji-few.safetensors")
    for steps, few in ((1, True), (2, True), (3, False), (None, False)):
        used = pipe("red heart", steps=steps).parameters
        assert (used["few"], used["guidance"]) == (few, 1.0 if few else 3.0)
        assert used["method"] == ("euler" if few else "ab2")
    off = pipe("red heart", steps=2, few=False).parameters
    assert (off["few"], off["guidance"], off["method"], off["lora_files"]) == (False, 3.0, "ab2", {})
    on = picture(pipe, steps=2)
    assert on == picture(make(), steps=2, lora=str(pipe.few), guidance=1.0, method="euler")
    assert on != picture(pipe, steps=2, few=False, guidance=1.0, method="euler")
    assert make()("red heart", steps=1).parameters["few"] is False


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", "other layers", "other shapes"])
def test_files_that_do_not_fit_are_one_line_and_leave_the_pipeline_usable(folder, content):
    file = folder / "bad.safetensors"
    if content == "other layers":
        save_file({f"nowhere.lora_{k}.weight": torch.ones(2, 2) for k in "AB"}, file)
    elif content == "other shapes":
        tensors = {f"text.out.lora_{k}.weight": torch.ones(2, 2) for k in "AB"}
        save_file(tensors, file)
    else:
        file.write_bytes(content)
    pipe = make()
    pixel = picture(pipe, lora="pixel")
    with pytest.raises(InputError, match="cannot be used") as caught:
        picture(pipe, lora=str(file))
    assert "\n" not in str(caught.value)
    assert picture(pipe, lora="pixel") == pixel
    with pytest.raises(InputError, match="use one of glow, pixel, or a file"):
        picture(pipe, lora="outline")
