"""Our models are diffusers' models, in every variant."""

import pkgutil
from importlib import import_module

import pytest
import torch

from tests.models import cases
from tests.models.parity import cast, error, models

FAMILIES = sorted(module.name for module in pkgutil.iter_modules(cases.__path__))
CASES = [case for name in FAMILIES for case in import_module(f"tests.models.cases.{name}").CASES]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
@torch.no_grad()
def test_parity_in_float32(case):
    theirs, ours = models(case)
    inputs = case.inputs()
    assert error(ours(**inputs), case.reference(theirs, inputs)) <= 4e-6


@every_case
@torch.no_grad()
def test_parity_in_bfloat16(case):
    """Not further from the float32 result than twice diffusers' own bfloat16 run."""
    exact = case.reference(models(case)[0], case.inputs())
    theirs, ours = models(case, torch.bfloat16)
    inputs = cast(case.inputs(), torch.bfloat16)
    assert error(ours(**inputs), exact) <= 2 * error(case.reference(theirs, inputs), exact)
