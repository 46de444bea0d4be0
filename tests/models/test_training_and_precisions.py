"""A model of each family as models are used: trained, compiled, in float16, with int8 layers."""

import pytest
import torch

from rfkernels import ops
from rfkernels.quantization.model import quantize
from tests.models.cases import hidream, lumina2, wan, zimage
from tests.models.parity import cast, error, models

CASES = {case.name: case for family in (wan, hidream, zimage, lumina2) for case in family.CASES}
NAMES = [
    "wan-pusa, times of frames",
    "hidream, not square",
    "z-image, captions of two lengths",
    "z-image-omni, two samples",
    "lumina2, captions of several lengths",
]
every_family = pytest.mark.parametrize("case", [CASES[name] for name in NAMES], ids=str)


def square(result) -> torch.Tensor:
    return sum((t * t).sum() for t in (result if isinstance(result, list) else [result]))


@every_family
def test_gradients(case):
    """Of all parameters; diffusers' experts run without gradients unless they are in training."""
    theirs, ours = models(case)
    for module in theirs.modules():
        module.training = type(module).__name__ == "MOEFeedForwardSwiGLU"
    for model in (theirs, ours):
        model.requires_grad_()
    square(case.reference(theirs, case.inputs())).backward()
    square(ours(**case.inputs())).backward()
    expected, found = {n: p.grad for n, p in theirs.named_parameters()}, dict(ours.named_parameters())
    scale = max(g.norm() for g in expected.values() if g is not None)
    for name, grad in expected.items():
        if grad is not None:
            assert (found[name].grad - grad).norm() <= 1e-5 * (grad.norm() + 1e-3 * scale), name


@pytest.mark.parametrize("case", [CASES[name] for name in (NAMES[0], NAMES[4])], ids=str)
@torch.no_grad()
def test_a_model_is_one_graph(case):
    ours = models(case)[1]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert error(compiled(**case.inputs()), ours(**case.inputs())) <= 1e-6


@every_family
@torch.no_grad()
def test_float16(case):
    """Not further from the float32 result than twice diffusers' own float16 run."""
    exact = case.reference(models(case)[0], case.inputs())
    theirs, ours = models(case, torch.float16)
    inputs = cast(case.inputs(), torch.float16)
    assert error(ours(**inputs), exact) <= 2 * error(case.reference(theirs, inputs), exact)


@every_family
@torch.no_grad()
def test_int8_layers_share_the_codes_of_their_tokens(case, monkeypatch):
    exact = case.reference(models(case)[0], case.inputs())
    ours, calls = models(case, torch.bfloat16)[1], []
    quantize(ours, "int8", min_size=0, keep=())
    region = ops.norm_modulate_quantize
    monkeypatch.setattr(ops, "norm_modulate_quantize", lambda *a, **k: calls.append(1) or region(*a, **k))
    assert error(ours(**cast(case.inputs(), torch.bfloat16)), exact) <= 0.15
    assert len(calls) >= sum(type(module).__name__.endswith("Block") for module in ours.modules())
