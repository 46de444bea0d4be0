"""Models of diffusers whose blocks run our forwards give what they gave before."""

from importlib import import_module
from types import MethodType

import pytest
import torch
from torch import nn

from rfkernels.integrations.families.forward import Unsupported
from tests.models.parity import cast, error, models

FAMILIES = ("sd3",)
CASES = [
    (family, case) for family in FAMILIES for case in import_module(f"tests.models.cases.{family}").CASES
]
every_case = pytest.mark.parametrize(("family", "case"), CASES, ids=str)


def blocks_of(family: str) -> dict:
    return import_module(f"rfkernels.integrations.families.{family}").BLOCKS


def bind(model: nn.Module, family: str) -> int:
    """Puts our forwards in place of those of the blocks; how many blocks have one."""
    count = 0
    for block in model.modules():
        if forward := blocks_of(family).get(type(block).__name__):
            assert forward.refusal(block) is None
            block.forward = MethodType(forward.run, block)
            count += 1
    return count


def outputs(case, family: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What diffusers' model gives by its own blocks and by ours."""
    model, _ = models(case, dtype)
    inputs = cast(case.inputs(), dtype)
    expected = case.reference(model, inputs)
    assert bind(model, family) >= case.config["num_layers"]
    return case.reference(model, inputs), expected


@every_case
@torch.no_grad()
def test_float32(family, case):
    assert error(*outputs(case, family, torch.float32)) <= 4e-6


@every_case
@torch.no_grad()
def test_bfloat16(family, case):
    exact = case.reference(models(case)[0], case.inputs())
    ours, theirs = outputs(case, family, torch.bfloat16)
    assert error(ours, exact) <= 2 * error(theirs, exact)


@pytest.mark.parametrize("family", ["sd3"])
@torch.no_grad()
def test_float64(family):
    """Of a model where diffusers has no norm or rotation in float32."""
    case = import_module(f"tests.models.cases.{family}").CASES[0]
    assert error(*outputs(case, family, torch.float64)) <= 1e-10


def unsupported(family: str, name: str, match: str, model: nn.Module, *args, **arguments) -> None:
    """The forward refuses the arguments and has run nothing."""
    (block, *_) = (b for b in model.modules() if type(b).__name__ == name)
    with pytest.raises(Unsupported, match=match):
        blocks_of(family)[name].run(block, *args, **arguments)


def test_what_sd3_does_not_cover():
    import diffusers
    from diffusers.models.attention import JointTransformerBlock

    from tests.models.cases.sd3 import CONFIG

    model = diffusers.SD3Transformer2DModel(**CONFIG)
    name = "JointTransformerBlock"
    unsupported("sd3", name, "scale", model, None, None, None, joint_attention_kwargs={"scale": 2})
    model.enable_forward_chunking(1, 1)
    unsupported("sd3", name, "chunked", model, None, None, None)
    layer_norm = JointTransformerBlock(32, 2, 16, qk_norm="layer_norm")
    unsupported("sd3", name, "LayerNorm", layer_norm, None, None, None)
    model.fuse_qkv_projections()
    assert "FusedJointAttnProcessor2_0" in blocks_of("sd3")[name].refusal(model.transformer_blocks[0])
