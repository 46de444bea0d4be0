"""What parity with diffusers does not see of the models of images: errors, tables made ahead."""

import pytest
import torch

from rfkernels.models import qwen
from rfkernels.models.auraflow import AuraFlow
from rfkernels.models.dit import DiT, from_diffusers
from rfkernels.models.qwen import QwenImage
from rfkernels.models.sd3 import SD3
from tests.models.cases import auraflow as auraflow_cases
from tests.models.cases import chroma as chroma_cases
from tests.models.cases import dit as dit_cases
from tests.models.cases import flux2 as flux2_cases
from tests.models.cases import flux3 as flux3_cases
from tests.models.cases import pixart as pixart_cases
from tests.models.cases import qwen as qwen_cases
from tests.models.cases import sd3 as sd3_cases


def made(cases, index: int = 0):
    """A model of a case with random weights, and its inputs."""
    case = cases.CASES[index]
    torch.manual_seed(0)
    return case.ours_class(**case.config, **case.ours_config).eval(), case.inputs()


@torch.no_grad()
def test_sd3_errors():
    model, inputs = made(sd3_cases)
    with pytest.raises(ValueError, match="multiples of 2, got 3 x 4"):
        model(**inputs | {"hidden_states": torch.zeros(2, 4, 3, 4)})
    with pytest.raises(ValueError, match="at most 12 x 12 patches have a position, got 13 x 2"):
        model(**inputs | {"hidden_states": torch.zeros(2, 4, 26, 4)})
    with pytest.raises(ValueError, match="qk_norm must be None or rms_norm, got 'layer_norm'"):
        SD3(**sd3_cases.CONFIG | {"qk_norm": "layer_norm"})
    with pytest.raises(ValueError, match="caption_projection_dim must be the width 48, got 40"):
        SD3(**sd3_cases.CONFIG | {"caption_projection_dim": 40})


@torch.no_grad()
def test_qwen_errors():
    model, inputs = made(qwen_cases)
    for wrong, match in [
        ({"timestep": None}, "timestep and img_shapes must be given"),
        ({"img_shapes": None}, "timestep and img_shapes must be given"),
        ({"img_shapes": []}, "at least one"),
        ({"img_shapes": [[(1, 5, 7)], [(1, 7, 5)]]}, "must be the same for all samples"),
        ({"img_shapes": [(1, 5, 6)] * 2}, r"must have 35 tokens, got \[\(1, 5, 6\)\]"),
        ({"encoder_hidden_states_mask": torch.ones(2, 10)}, r"must be \[2, 11\], got \[2, 10\]"),
        ({"additional_t_cond": torch.tensor([0, 1])}, "the model has no embedding of it, got one"),
    ]:
        with pytest.raises(ValueError, match=match):
            model(**inputs | wrong)
    layered = QwenImage(**qwen_cases.CONFIG, use_additional_t_cond=True)
    with pytest.raises(ValueError, match="the model has an embedding of it, got none"):
        layered(**inputs)


@torch.no_grad()
def test_qwen_takes_a_rotation_made_ahead():
    model, inputs = made(qwen_cases)
    rotation = model.rotation(inputs["img_shapes"], 11)
    assert torch.equal(model(**inputs, rotation=rotation), model(**inputs))


def test_a_mask_of_ones_is_no_bias():
    assert qwen.text_bias(torch.ones(2, 3), torch.float32, 4) is None
    bias = qwen.text_bias(torch.tensor([[1, 0, 1]]), torch.bfloat16, 2)
    assert bias.dtype == torch.bfloat16
    assert bias.tolist() == [[[[0, -torch.inf, 0, 0, 0]]]]


@torch.no_grad()
def test_flux2_errors():
    model, inputs = made(flux2_cases)
    with pytest.raises(ValueError, match="guidance: the model has an embedding of it, got none"):
        model(**inputs | {"guidance": None})


@torch.no_grad()
def test_flux2_takes_a_rotation_made_ahead():
    model, inputs = made(flux2_cases, 2)
    rotation = model.rotation(inputs["img_ids"], inputs["txt_ids"])
    without = inputs | {"img_ids": None, "txt_ids": None}
    assert torch.equal(model(**without, rotation=rotation), model(**inputs))


@torch.no_grad()
def test_guidance_of_three_channels():
    """As the original has it: the second half of the latents is not read, other channels are not guided."""
    for index in (1, 6):  # DiT with variances, SiT
        model, inputs = made(dit_cases, index)
        x, t, labels = inputs["hidden_states"], inputs["timestep"][:1].repeat(2), inputs["class_labels"]
        with_class, without = model(x[:1].repeat(2, 1, 1, 1), t, labels)
        guided = model.forward_with_cfg(x, t, labels, 4.0)
        assert torch.equal(guided[:, 3:], torch.stack([with_class, without])[:, 3:])
        expected = without[:3] + 4 * (with_class[:3] - without[:3])
        torch.testing.assert_close(guided[:, :3], expected.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="the batch must be even, got 1"):
        model.forward_with_cfg(x[:1], t[:1], labels[:1], 4.0)


@torch.no_grad()
def test_sit_leaves_variances_out():
    model, inputs = made(dit_cases, 7)
    assert model.proj_out_2.out_features == 4 * 8
    assert torch.equal(model(**inputs), DiT.forward(model, **inputs)[:, :4])


def test_embeddings_of_dit_that_differ_between_blocks():
    name = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"
    state = {name.format(0): torch.zeros(3, 2), name.format(1): torch.zeros(3, 2), "proj": torch.ones(1)}
    assert list(from_diffusers(state)) == ["emb.class_embedder.embedding_table.weight", "proj"]
    state[name.format(1)] = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"embedding_table.weight of transformer_blocks.1 differs"):
        from_diffusers(state)


@torch.no_grad()
def test_pixart_errors():
    model, inputs = made(pixart_cases)
    with pytest.raises(ValueError, match=r"must be \[2, 11\], or have a 1 between, got \[2, 10\]"):
        model(**inputs, encoder_attention_mask=torch.ones(2, 10))
    model, inputs = made(pixart_cases, 6)
    for sizes in (None, {"resolution": None, "aspect_ratio": None}):
        with pytest.raises(ValueError, match=r"must have resolution and aspect_ratio, got \[\]"):
            model(**inputs | {"added_cond_kwargs": sizes})


@torch.no_grad()
def test_auraflow_errors():
    model, inputs = made(auraflow_cases)
    with pytest.raises(ValueError, match="at most 10 x 10 patches have a position, got 11 x 2"):
        model(**inputs | {"hidden_states": torch.zeros(2, 4, 22, 4)})
    with pytest.raises(ValueError, match=r"patch \(2, 2\) must divide the size, got \(3, 4\)"):
        model(**inputs | {"hidden_states": torch.zeros(2, 4, 3, 4)})
    with pytest.raises(ValueError, match="caption_projection_dim must be the width 48, got 40"):
        AuraFlow(**auraflow_cases.CONFIG | {"caption_projection_dim": 40})


@torch.no_grad()
def test_chroma():
    model, inputs = made(chroma_cases)
    with pytest.raises(ValueError, match=r"attention_mask: must be \[2, 46\], got \[2, 11\]"):
        model(**inputs, attention_mask=torch.ones(2, 11))
    rotation = model.rotation(inputs["img_ids"], inputs["txt_ids"][None])
    without = inputs | {"img_ids": None, "txt_ids": None}
    assert torch.equal(model(**without, rotation=rotation), model(**inputs))


@torch.no_grad()
def test_flux3_errors():
    model, inputs = made(flux3_cases, 2)
    for name in ("image_cond_ids", "image_cond_hidden_states"):
        with pytest.raises(ValueError, match="must be given together, got one"):
            model(**inputs | {name: None})
    with pytest.raises(ValueError, match="the model is no flow map, got one"):
        model(**inputs, target_timestep=torch.zeros(2))
    model, inputs = made(flux3_cases, 3)
    with pytest.raises(ValueError, match="the model is a flow map, got none"):
        model(**inputs | {"target_timestep": None})
