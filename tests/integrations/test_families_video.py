"""A model of diffusers whose blocks run our forwards is the model."""

import types
from dataclasses import replace

import pytest
import torch

from rfkernels.integrations.families import hidream, lumina2, wan, zimage
from rfkernels.integrations.families.forward import Unsupported
from tests.models.cases import hidream as hidream_cases
from tests.models.cases import lumina2 as lumina2_cases
from tests.models.cases import wan as wan_cases
from tests.models.cases import zimage as zimage_cases
from tests.models.parity import cast, error, models

FAMILIES = [
    (wan.BLOCKS, wan_cases.CASES),
    (hidream.BLOCKS, hidream_cases.CASES),
    (zimage.BLOCKS, zimage_cases.CASES),
    (lumina2.BLOCKS, lumina2_cases.CASES),
]


def bound(model, blocks):
    """The model with our forwards in its blocks, each of which counts its calls."""
    calls = dict.fromkeys(blocks, 0)
    for module in model.modules():
        name = type(module).__name__
        if name in blocks:
            assert blocks[name].refusal(module) is None

            def forward(block, *args, _name=name, **kwargs):
                calls[_name] += 1
                return blocks[_name].run(block, *args, **kwargs)

            module.forward = types.MethodType(forward, module)
    return model, calls


CASES = [pytest.param(blocks, case, id=str(case)) for blocks, cases in FAMILIES for case in cases]


@pytest.mark.parametrize(("blocks", "case"), CASES)
@torch.no_grad()
def test_parity_in_float32(blocks, case):
    theirs, _ = models(case)
    exact = case.reference(theirs, case.inputs())
    model, calls = bound(theirs, blocks)
    assert error(case.reference(model, case.inputs()), exact) <= 4e-6
    assert sum(calls.values()) > 0


@pytest.mark.parametrize(("blocks", "case"), [p for p in CASES if not p.values[1].discrete])
@torch.no_grad()
def test_parity_in_bfloat16(blocks, case):
    """Not further from the float32 result than twice diffusers' own bfloat16 run."""
    exact = case.reference(models(case)[0], case.inputs())
    theirs, _ = models(case, torch.bfloat16)
    inputs = cast(case.inputs(), torch.bfloat16)
    own = error(case.reference(theirs, inputs), exact)
    assert error(case.reference(bound(theirs, blocks)[0], inputs), exact) <= 2 * own


@pytest.mark.parametrize(("blocks", "cases"), FAMILIES, ids=["wan", "hidream", "z-image", "lumina2"])
@torch.no_grad()
def test_float64(blocks, cases):
    """diffusers rotates in float32."""
    case = replace(cases[0], wide=())
    theirs, _ = models(case, torch.float64)
    inputs = cast(case.inputs(), torch.float64)
    exact = case.reference(theirs, inputs)
    model, calls = bound(theirs, blocks)
    assert error(case.reference(model, inputs), exact) <= 1e-6 and sum(calls.values()) > 0


def test_a_rotation_of_half_a_head_is_refused():
    import diffusers

    config = hidream_cases.CONFIG | {"axes_dims_rope": (6, 4, 2)}
    model, calls = bound(diffusers.HiDreamImageTransformer2DModel(**config).eval(), hidream.BLOCKS)
    with pytest.raises(Unsupported, match="12 of 24 channels of a head are rotated"):
        model(**hidream_cases.inputs())
    assert sum(calls.values()) == 1
