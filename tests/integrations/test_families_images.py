"""Models of diffusers whose blocks run our forwards give what they gave before."""

from importlib import import_module
from types import MethodType

import pytest
import torch
from torch import nn

import rfkernels
from rfkernels.integrations.accelerate import accelerated
from rfkernels.integrations.families.forward import Unsupported
from tests.models.parity import cast, error, models

FAMILIES = {
    "sd3": "sd3",
    "qwen": "qwen",
    "flux2": "flux2",
    "dit": "dit",
    "pixart": "dit",
    "auraflow": "auraflow",
    "chroma": "chroma",
    "flux3": "flux3",
}  # of cases: of blocks
CASES = [
    (blocks, case)
    for cases, blocks in FAMILIES.items()
    for case in import_module(f"tests.models.cases.{cases}").CASES
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
    assert bind(model, family) >= 2
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


@pytest.mark.parametrize("cases", ["sd3", "dit", "pixart"])
@torch.no_grad()
def test_float64(cases):
    """Of models where diffusers has no norm or rotation in float32."""
    case = import_module(f"tests.models.cases.{cases}").CASES[0]
    assert error(*outputs(case, FAMILIES[cases], torch.float64)) <= 1e-10


@pytest.mark.parametrize("cases", FAMILIES)
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")
@torch.no_grad()
def test_accelerate(cases):
    """All blocks that are called run ours, quantised ones too, and every bit comes back."""
    case = import_module(f"tests.models.cases.{cases}").CASES[0]
    model, _ = models(case)
    inputs = case.inputs()
    expected = case.reference(model, inputs)
    for quant, bound in [(None, 4e-6), ({"method": "int8", "min_size": 0}, 0.05)]:
        rfkernels.accelerate(model, quant)
        assert error(case.reference(model, inputs), expected) <= bound
        sites = accelerated(model).sites.values()
        assert len(sites) >= 3 and not any(site.refusal or site.declined for site in sites)
        assert [site.calls for site in sites].count(0) == 2 * (cases == "flux3")  # no references
        rfkernels.restore(model)
    assert torch.equal(case.reference(model, inputs), expected)


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


def test_what_blocks_share_is_made_once(monkeypatch):
    """And again where a tensor is another one or was written to."""
    from rfkernels.integrations.families.once import once

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
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert once(make, a, b, factor=3) is not once(make, a, b, factor=3)


@torch.no_grad()
def test_what_flux2_does_not_cover():
    import diffusers

    from tests.models.cases.flux2 import CONFIG

    double, single = "Flux2TransformerBlock", "Flux2SingleTransformerBlock"
    model = diffusers.Flux2Transformer2DModel(**CONFIG)
    kept = {"kv_cache_mode": "extract"}  # its processors do not know it
    text = torch.zeros(1, 3, 72)
    unsupported("flux2", double, "kv_cache_mode", model, text, text, None, None, None, kept)
    unsupported("flux2", single, "kv_cache_mode", model, text, text, None, None, kept)


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


@torch.no_grad()
def test_what_dit_and_pixart_do_not_cover():
    from diffusers.models.attention import BasicTransformerBlock

    name = "BasicTransformerBlock"
    x, text = torch.zeros(2, 5, 32), torch.zeros(2, 3, 32)
    pixart = {"cross_attention_dim": 32, "norm_type": "ada_norm_single", "norm_elementwise_affine": False}
    pixart |= {"activation_fn": "gelu-approximate"}

    def refused(match: str, options: dict, *args, **arguments):
        unsupported("dit", name, match, BasicTransformerBlock(32, 2, 16, **options), *args, **arguments)

    mask = torch.zeros(2, 1, 3)
    refused("attention_mask was given", pixart, x, torch.zeros(2, 1, 5), text)
    refused(r"cross_attention_kwargs \(scale\)", pixart, x, None, text, cross_attention_kwargs={"scale": 1})
    refused("4 axes", pixart, x[:, None], None, text)
    refused("without encoder_hidden_states", pixart, x)
    refused("not one row per sample", pixart, x, None, text, mask[:, :, :2])
    for match, options in [
        ("norm_type is layer_norm", {"norm_type": "layer_norm"}),
        ("attentions", {"cross_attention_dim": None}),
        ("attentions", {"only_cross_attention": True}),
        ("attentions", {"double_self_attention": True}),
        ("affine", {"norm_elementwise_affine": True}),
        ("positions", {"positional_embeddings": "sinusoidal", "num_positional_embeddings": 5}),
        ("fuser", {"attention_type": "gated"}),
        ("GEGLU", {"activation_fn": "geglu"}),
        ("GELU, not GELU by tanh", {"activation_fn": "gelu"}),
        ("dropout", {"dropout": 0.1}),
    ]:
        refused(match, pixart | options, x, None, text)
        block = BasicTransformerBlock(32, 2, 16, **pixart | options)
        assert match in blocks_of("dit")[name].refusal(block)
    block = BasicTransformerBlock(32, 2, 16, **pixart)
    block.set_chunk_feed_forward(1)
    unsupported("dit", name, "chunked", block, x, None, text)


@torch.no_grad()
def test_what_auraflow_does_not_cover():
    import diffusers

    from tests.models.cases.auraflow import CONFIG

    model = diffusers.AuraFlowTransformer2DModel(**CONFIG)
    for name, count in [("AuraFlowJointTransformerBlock", 3), ("AuraFlowSingleTransformerBlock", 2)]:
        unsupported("auraflow", name, "scale", model, *(None,) * count, attention_kwargs={"scale": 2})


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")
def test_what_chroma_does_not_cover():
    import diffusers

    from tests.models.cases.chroma import CONFIG

    model = diffusers.ChromaTransformer2DModel(**CONFIG)
    for name, count in [("ChromaTransformerBlock", 3), ("ChromaSingleTransformerBlock", 2)]:
        unsupported("chroma", name, "scale", model, *(None,) * count, joint_attention_kwargs={"scale": 2})
