"""Models of images as they are used: trained, in float16, with int8 layers."""

from collections import defaultdict
from importlib import import_module

import pytest
import torch

import rfkernels
from tests.models.parity import cast, error, models

FAMILIES = ("auraflow", "chroma", "dit", "flux2", "flux3", "pixart", "qwen", "sd3")
NAMES = ("", "sd3.5-medium", "qwen-image-edit-2511", "flux3, references")
CASES = [
    case
    for family in FAMILIES
    for i, case in enumerate(import_module(f"tests.models.cases.{family}").CASES)
    if i == 0 or str(case) in NAMES
]

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def made(case):
    torch.manual_seed(0)
    return case.ours_class(**case.config, **case.ours_config).eval().requires_grad_(False), case.inputs()


@every_case
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


@every_case
def test_gradients(case):
    """Of all parameters; an embedding that DiT of diffusers has in every block gets the sum."""
    theirs, ours = models(case)
    inputs = case.inputs()
    for model in (theirs, ours):
        model.requires_grad_()
    case.reference(theirs, inputs).square().sum().backward()
    ours(**inputs).square().sum().backward()
    expected = defaultdict(float)
    for name, p in theirs.named_parameters():
        if p.grad is not None:
            _, shared, part = name.partition(".norm1.emb.")
            expected[f"emb.{part}" if shared else name] += p.grad
    scale = max(grad.norm() for grad in expected.values())
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 2e-5 * (grad.norm() + 1e-3 * scale), name


@every_case
@torch.no_grad()
def test_float16(case):
    """Not further from the float32 result than twice diffusers' own float16 run."""
    exact = case.reference(models(case)[0], case.inputs())
    theirs, ours = models(case, torch.float16)
    inputs = cast(case.inputs(), torch.float16)
    assert error(ours(**inputs), exact) <= 2 * error(case.reference(theirs, inputs), exact)
