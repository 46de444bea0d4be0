"""Models of images with quantised layers: norms hand codes to them, their epilogues end the branches."""

from importlib import import_module

import pytest
import torch

import rfkernels
from tests.models.parity import error

FAMILIES = ("auraflow", "chroma", "dit", "flux2", "flux3", "pixart", "qwen", "sd3")
NAMES = ("", "sd3.5-medium", "qwen-image-edit-2511", "flux3, references")
CASES = [
    case
    for family in FAMILIES
    for i, case in enumerate(import_module(f"tests.models.cases.{family}").CASES)
    if i == 0 or str(case) in NAMES
]


def made(case):
    torch.manual_seed(0)
    return case.ours_class(**case.config, **case.ours_config).eval().requires_grad_(False), case.inputs()


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_codes_of_a_norm_are_those_of_its_layers(case, monkeypatch):
    model, inputs = made(case)
    exact = model(**inputs)
    report = rfkernels.quantize(model, "int8", keep=(), min_size=0)
    together = model(**inputs)
    assert sum(layer.format == "int8" for layer in report.layers) > 20
    assert error(together, exact) <= 0.1
    monkeypatch.setattr("rfkernels.models.layers._coding", lambda *_: None)
    assert error(model(**inputs), together) <= 1e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_reach_the_input(case):
    model, inputs = made(case)
    inputs["hidden_states"].requires_grad_()
    model(**inputs).square().sum().backward()
    grad = inputs["hidden_states"].grad
    assert grad.isfinite().all() and grad.abs().amin(-1).gt(0).any()
