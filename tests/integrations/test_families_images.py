"""Models of diffusers whose blocks run our forwards give what they gave before."""

from importlib import import_module
from types import MethodType

import pytest
import torch
from torch import nn

from rfkernels.integrations.families.forward import Unsupported
from tests.models.parity import cast, error, models

FAMILIES = ("sd3", "qwen", "flux2")
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


@torch.no_grad()
def test_what_qwen_image_does_not_cover():
    import diffusers

    from tests.models.cases.qwen import CONFIG

    name, none = "QwenImageTransformerBlock", (None,) * 4
    model = diffusers.QwenImageTransformer2DModel(**CONFIG)
    unsupported("qwen", name, "scale", model, *none, joint_attention_kwargs={"scale": 2})
    unsupported("qwen", name, "with modulate_index", model, *none, modulate_index=torch.zeros(1, 3))
    model = diffusers.QwenImageTransformer2DModel(**CONFIG, zero_cond_t=True)
    unsupported("qwen", name, "without modulate_index", model, *none)


def test_what_blocks_share_is_made_once():
    """And again where a tensor is another one or was written to."""
    from rfkernels.integrations.families.qwen import once

    calls = []

    def make(a, b, factor):
        calls.append(factor)
        return factor * (a + b)

    a, b = torch.ones(2), torch.ones(2)
    assert once(make, a, b, factor=2) is once(make, a, b, factor=2)
    assert calls == [2]
    assert once(make, a, b, factor=3).tolist() == [6, 6]
    assert once(make, a, b.clone(), factor=3).tolist() == [6, 6]
    b += 1
    assert once(make, a, b, factor=3).tolist() == [9, 9]
    a += 1
    assert once(make, a, b, factor=3).tolist() == [12, 12]
    assert calls == [2, 3, 3, 3, 3]


@torch.no_grad()
def test_what_flux2_does_not_cover():
    import diffusers

    from tests.models.cases.flux2 import CONFIG

    double, single = "Flux2TransformerBlock", "Flux2SingleTransformerBlock"
    model = diffusers.Flux2Transformer2DModel(**CONFIG)
    kept, per_token = {"kv_cache_mode": "extract"}, torch.zeros(1, 3, 4)
    unsupported("flux2", double, "kv_cache_mode", model, *(None,) * 4, joint_attention_kwargs=kept)
    unsupported("flux2", single, "kv_cache_mode", model, *(None,) * 3, joint_attention_kwargs=kept)
    unsupported("flux2", double, "its own modulation", model, None, None, per_token, per_token)
    unsupported("flux2", single, "its own modulation", model, None, None, per_token)


@torch.no_grad()
def test_a_single_block_of_flux2_splits_its_tokens():
    from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock

    torch.manual_seed(0)
    block, run = Flux2SingleTransformerBlock(32, 2, 16), blocks_of("flux2")["Flux2SingleTransformerBlock"].run
    image, text, modulation = torch.randn(2, 5, 32), torch.randn(2, 3, 32), torch.randn(2, 96)
    for arguments in (
        (image, text, modulation, None, None, True),
        (torch.cat([text, image], 1), None, modulation, None, None, True, 3),
    ):
        for ours, theirs in zip(run(block, *arguments), block(*arguments), strict=True):
            assert ours.shape == theirs.shape
            assert error(ours, theirs) <= 4e-6
