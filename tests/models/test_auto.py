"""The model in a file, in both namings, quantised, sharded."""

import dataclasses

import pytest
import torch

from rfkernels.formats import convert
from rfkernels.formats.configs import CLASSES
from rfkernels.formats.container import write_safetensors
from rfkernels.models import auto
from rfkernels.models.auto import MODELS, load_model
from rfkernels.nn import QuantLinear
from tests.models.parity import error, models
from tests.models.test_parity import CASES

MARKS = {  # how the name of a family's first case begins
    "auraflow": "auraflow",
    "chroma": "chroma",
    "flux": "flux-dev",
    "flux2": "flux2-dev",
    "flux3": "flux3",
    "hidream": "hidream",
    "lumina2": "lumina2",
    "pixart": "pixart-sigma",
    "qwen-image": "qwen-image",
    "sd3": "sd3.5-medium",
    "wan": "wan-i2v",
    "z-image": "z-image",
}
ONE_NAMING = {"pixart"}  # no other that is written here


@pytest.fixture(params=MARKS)
def family(request):
    return request.param


def small(family: str):
    """A case, its models, and a file of it in diffusers' names."""
    case = next(c for c in CASES if c.name.startswith(MARKS[family]))
    return case, *models(case)


def configured(monkeypatch, case):
    """Heads and positions of a tiny model are not the published ones, which `detect` assumes."""
    real = auto.detect
    monkeypatch.setattr(auto, "detect", lambda s: dataclasses.replace(real(s), config=case.config))


@torch.no_grad()
@pytest.mark.parametrize("naming", ["diffusers", "original"])
def test_model_of_a_file(family, naming, tmp_path, monkeypatch):
    case, theirs, ours = small(family)
    if naming == "original" and family in ONE_NAMING:
        pytest.skip("has one naming")
    configured(monkeypatch, case)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, theirs.state_dict().items())
    if naming == "original":
        convert(path, tmp_path / "original.safetensors", to="original", prefix="model.diffusion_model.")
        path = tmp_path / "original.safetensors"
    loaded = load_model(path, dtype=torch.float32)
    assert type(loaded) is type(ours) and not loaded.training
    inputs = case.inputs()
    torch.testing.assert_close(loaded(**inputs), ours(**inputs), rtol=0, atol=0)


def test_every_family_but_dit():
    assert MARKS.keys() == MODELS.keys() == CLASSES.keys() - {"dit"}


@torch.no_grad()
def test_quantised_as_it_arrives(tmp_path, monkeypatch):
    case, theirs, ours = small("flux")
    configured(monkeypatch, case)
    write_safetensors(tmp_path / "a", theirs.state_dict().items(), max_shard_bytes=100_000)
    loaded = load_model(tmp_path, dtype=torch.float32, method="int8")
    assert sum(isinstance(m, QuantLinear) for m in loaded.modules()) > 40
    assert 1e-4 < error(loaded(**case.inputs()), ours(**case.inputs())) < 0.1


def test_what_wan_has_in_float32(tmp_path):
    write_safetensors(tmp_path / "a", small("wan")[1].state_dict().items())
    dtypes = {n: p.dtype for n, p in load_model(tmp_path / "a").named_parameters()}
    wide = {n for n, dtype in dtypes.items() if dtype == torch.float32}
    assert {"scale_shift_table", "blocks.0.norm2.weight", "blocks.1.scale_shift_table"} <= wide
    assert "blocks.0.attn1.to_q.weight" not in wide
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}


def test_refusals(tmp_path):
    write_safetensors(tmp_path / "a", [("x.weight", torch.ones(2, 2))])
    with pytest.raises(ValueError, match=r"a model of .*flux.* is required"):
        load_model(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_model(tmp_path / "nowhere.safetensors")
