"""Small transformers of diffusers with random weights, and inputs for them."""

from collections.abc import Callable

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    HiDreamImageTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn

__all__ = ["CALLS", "MODELS", "run"]

SIZE = {"num_attention_heads": 2, "attention_head_dim": 16}
TIMES = torch.tensor([250.0, 125.0])  # bfloat16 numbers, as integers and as thousandths
Made = tuple[nn.Module, dict[str, Tensor]]


def flux() -> Made:
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        **SIZE,
    )
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(5.0))
    inputs = {
        "hidden_states": torch.randn(2, 15, 4),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": TIMES / 1000,
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
    }
    return model, inputs


def sd3(**options) -> Made:
    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        **options,
        **SIZE,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": TIMES,
    }
    return model, inputs


def sd35() -> Made:
    """With a second attention of the image alone in the first blocks."""
    return sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm")


def sd3_fused() -> Made:
    model, inputs = sd3()
    model.fuse_qkv_projections()
    return model, inputs


def wan(**options) -> Made:
    model = WanTransformer3DModel(
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=32,
        **options,
        **SIZE,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 8, 6),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "timestep": TIMES,
    }
    return model, inputs


def wan_i2v() -> Made:
    model, inputs = wan(image_dim=32, added_kv_proj_dim=32)
    return model, inputs | {"encoder_hidden_states_image": torch.randn(2, 9, 32)}


def hidream(axes: tuple[int, ...] = (4, 6, 6)) -> Made:
    """An image that is not square, which it pads; without its mixture of experts, whose choices are not
    continuous in the tokens."""
    model = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        caption_channels=[24, 20],
        text_emb_dim=32,
        num_routed_experts=0,
        axes_dims_rope=axes,
        max_resolution=(12, 12),
        llama_layers=[0, 1],
        force_inference_output=True,
        **SIZE,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 12, 8),
        "timesteps": TIMES,
        "encoder_hidden_states_t5": torch.randn(2, 5, 24),
        "encoder_hidden_states_llama3": torch.randn(2, 2, 6, 20),
        "pooled_embeds": torch.randn(2, 32),
    }
    return model, inputs


def hidream_half() -> Made:
    """Half of every head is rotated."""
    return hidream((4, 2, 2))


def auraflow() -> Made:
    model = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=16,
        **SIZE,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "timestep": TIMES / 1000,
    }
    return model, inputs


def auraflow_fused() -> Made:
    model, inputs = auraflow()
    model.fuse_qkv_projections()
    return model, inputs


def lumina2() -> Made:
    """Texts of two lengths, and three queries to a key."""
    model = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=96,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=6,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(32, 16, 16),
        cap_feat_dim=24,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": TIMES / 1000,
        "encoder_hidden_states": torch.randn(2, 6, 24),
        "encoder_attention_mask": torch.tensor([[True] * 6, [True] * 3 + [False] * 3]),
    }
    return model, inputs


def dit() -> Made:
    model = DiTTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=10, **SIZE
    )
    labels = {"class_labels": torch.tensor([1, 2]), "timestep": torch.tensor([3, 7])}
    return model, {"hidden_states": torch.randn(2, 4, 8, 8)} | labels


def pixart() -> Made:
    """Whose text is padded to one length, under a mask."""
    model = PixArtTransformer2DModel(
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=24,
        use_additional_conditions=False,
        **SIZE,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": TIMES,
        "encoder_hidden_states": torch.randn(2, 6, 24),
        "encoder_attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, inputs


MODELS = {f.__name__: f for f in (flux, sd3, sd35, sd3_fused, wan, wan_i2v, hidream, dit, pixart)}
MODELS |= {f.__name__: f for f in (hidream_half, auraflow, auraflow_fused, lumina2)}
# attentions of a forward pass
CALLS = {"flux": 2, "sd3": 3, "sd35": 5, "sd3_fused": 3, "wan": 4, "wan_i2v": 6, "hidream": 2, "dit": 2}
CALLS |= {"pixart": 4, "auraflow": 2, "auraflow_fused": 2, "lumina2": 3, "hidream_half": 2}


@torch.no_grad()
def made(name: str, dtype: torch.dtype) -> Made:
    """A model whose weights and inputs are bfloat16 numbers, of size one through every layer."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    for p in model.parameters():
        p.copy_(p.bfloat16())
    cast = lambda t: t.bfloat16().to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t
    return model.eval().to(dtype), {key: cast(value) for key, value in inputs.items()}


@torch.no_grad()
def run(name: str, dtype: torch.dtype, change: Callable[[nn.Module], object] = lambda model: None) -> Tensor:
    """The output of a model after `change(model)`."""
    model, inputs = made(name, dtype)
    change(model)
    return model(**inputs, return_dict=False)[0]
