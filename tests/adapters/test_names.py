"""Names and rows: diffusers' converters read what our table writes."""

import pytest
import torch

from rfkernels.adapters.names import Names, bare
from tests.adapters.models import CONVERTED, converted, model_of, original, original_names


@pytest.mark.parametrize("family", CONVERTED)
def test_round_trip_through_the_converter(family):
    model = model_of(family)
    expected, result = model.state_dict(), converted(family, original(model))
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(result[name], tensor), name


@pytest.mark.parametrize("family", CONVERTED)
def test_underscores_and_prefixes_mean_the_same(family):
    model = model_of(family)
    names = Names(model)
    for alias, targets in original_names(model).items():
        assert names.find(alias) == targets
        for prefix in ("diffusion_model.", "model.diffusion_model.", "base_model.model.", "lora_unet_"):
            assert names.find(prefix + alias) == targets
        assert names.find("lora_unet_" + alias.replace(".", "_")) == targets
    for own in ("lycoris_", "lora_transformer_"):
        assert names.find(f"{own}proj_out") == names.find("proj_out")


def test_own_names_of_every_model():
    for family in ("flux", "wan", "qwen", "z_image"):
        model = model_of(family)
        names = Names(model)
        for path, module in model.named_modules():
            if hasattr(module, "in_features"):
                assert [t.path for t in names.find(f"transformer.{path}")] == [path]


def test_unknown_names():
    names = Names(model_of("flux"))
    for name in (
        "double_blocks.2.img_attn.qkv",
        "lora_unet_double_blocks_0_img_attn",
        "",
        "transformer.",
        "foo",
    ):
        assert names.find(name) == ()


def test_bare():
    assert bare("base_model.model.transformer.proj_out") == "proj_out"
    assert bare("proj_out") == "proj_out"
