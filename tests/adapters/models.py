"""Tiny diffusers models in float64, their state dicts in the original names, and diffusers' own converters.

`original` inverts our table; the converter, which knows nothing of it, turns the result into names of
diffusers again: what comes back tells whether table, rows and swaps are right.
"""

import inspect
import re

import pytest
import torch
from torch import Tensor, nn

from rfkernels.adapters.names import Names
from tests.adapters.layers import randn

SIZES = {
    "flux": {
        "class": "FluxTransformer2DModel",
        "converter": "convert_flux_transformer_checkpoint_to_diffusers",
        "constants": {"inner_dim = 3072": "inner_dim = 24"},
        "config": {
            "in_channels": 8,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 12,
            "num_attention_heads": 2,
            "joint_attention_dim": 10,
            "pooled_projection_dim": 14,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 4, 4),
        },
    },
    "flux2": {
        "class": "Flux2Transformer2DModel",
        "converter": "convert_flux2_transformer_checkpoint_to_diffusers",
        "config": {
            "in_channels": 8,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 10,
            "timestep_guidance_channels": 12,
            "axes_dims_rope": (4, 4, 4, 4),
        },
    },
    "sd3": {
        "class": "SD3Transformer2DModel",
        "converter": "convert_sd3_transformer_checkpoint_to_diffusers",
        "config": {
            "sample_size": 8,
            "in_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 12,
            "num_attention_heads": 2,
            "joint_attention_dim": 10,
            "caption_projection_dim": 24,
            "pooled_projection_dim": 14,
            "out_channels": 4,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
    },
    "wan": {
        "class": "WanTransformer3DModel",
        "converter": "convert_wan_transformer_to_diffusers",
        "config": {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 10,
            "freq_dim": 12,
            "ffn_dim": 20,
            "num_layers": 2,
            "image_dim": 14,
            "added_kv_proj_dim": 24,
            "rope_max_seq_len": 32,
        },
    },
    "z_image": {
        "class": "ZImageTransformer2DModel",
        "converter": "convert_z_image_transformer_checkpoint_to_diffusers",
        "config": {
            "in_channels": 4,
            "dim": 24,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 10,
            "axes_dims": [4, 4, 4],
            "axes_lens": [16, 16, 16],
        },
    },
    "lumina2": {
        "class": "Lumina2Transformer2DModel",
        "converter": "convert_lumina2_to_diffusers",
        "constants": {"q_dim = 2304": "q_dim = 24", "v_dim = 768": "v_dim = 12"},
        "config": {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (4, 4, 4),
            "axes_lens": (16, 16, 16),
            "cap_feat_dim": 10,
        },
    },
    "auraflow": {
        "class": "AuraFlowTransformer2DModel",
        "converter": "convert_auraflow_transformer_checkpoint_to_diffusers",
        "config": {
            "sample_size": 8,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 2,
            "attention_head_dim": 12,
            "num_attention_heads": 2,
            "joint_attention_dim": 10,
            "caption_projection_dim": 24,
            "out_channels": 4,
            "pos_embed_max_size": 16,
        },
    },
    "qwen": {
        "class": "QwenImageTransformer2DModel",
        "converter": None,
        "config": {
            "in_channels": 8,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 12,
            "num_attention_heads": 2,
            "joint_attention_dim": 10,
            "axes_dims_rope": (4, 4, 4),
        },
    },
}
CONVERTED = [family for family, size in SIZES.items() if size["converter"]]
_XLABS = re.compile(r"(qkv|proj)_lora[12]|single_blocks\.\d+\.(qkv|proj)")


def model_of(family: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model whose parameters are all random."""
    diffusers = pytest.importorskip("diffusers")
    size = SIZES[family]
    model = getattr(diffusers, size["class"])(**size["config"]).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def converted(family: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' converter, at the size of the tiny model."""
    from diffusers.loaders import single_file_utils

    function = getattr(single_file_utils, SIZES[family]["converter"])
    source = inspect.getsource(function)
    for theirs, ours in SIZES[family].get("constants", {}).items():
        assert theirs in source
        source = source.replace(theirs, ours)
    scope = dict(vars(single_file_utils))
    exec(source, scope)
    return scope[function.__name__](dict(state))


def swapped(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def original_names(model: nn.Module) -> dict[str, tuple]:
    """The original name of every module of a model that has one, with its targets."""
    found: dict[str, tuple] = {}
    taken = set()
    for alias, targets in sorted(Names(model).table.items()):  # the table is made from a set
        paths = {t.path for t in targets}
        if (
            alias in paths
            or paths & taken
            or _XLABS.fullmatch(alias.split(".", 2)[-1])
            or _XLABS.search(alias)
        ):
            continue
        if alias.endswith(".to_out"):
            continue
        found[alias] = targets
        taken |= paths
    return found


def original(model: nn.Module) -> dict[str, Tensor]:
    """The state dict in the original names."""
    state, result = dict(model.state_dict()), {}
    for alias, targets in original_names(model).items():
        if targets[0].path in state:  # a parameter
            result[alias] = state.pop(targets[0].path)
            continue
        for suffix in ("weight", "bias"):
            parts = [state.pop(f"{t.path}.{suffix}", None) for t in targets]
            if parts[0] is None:
                continue
            whole = torch.cat([swapped(p) if t.swap else p for p, t in zip(parts, targets, strict=True)])
            norm = alias.endswith(("query_norm", "key_norm"))
            result[f"{alias}.{'scale' if norm else suffix}"] = whole
    return result | {name.replace("pos_embed.pos_embed", "pos_embed"): t for name, t in state.items()}


INPUTS = {
    "flux": lambda: {
        "hidden_states": randn(2, 6, 8, seed=1),
        "encoder_hidden_states": randn(2, 5, 10, seed=2),
        "pooled_projections": randn(2, 14, seed=3),
        "timestep": torch.tensor([0.3, 0.8], dtype=torch.float64),
        "guidance": torch.tensor([3.0, 3.0], dtype=torch.float64),
        "img_ids": torch.arange(18).view(6, 3),
        "txt_ids": torch.zeros(5, 3, dtype=torch.int64),
    },
    "sd3": lambda: {
        "hidden_states": randn(2, 4, 8, 8, seed=1),
        "encoder_hidden_states": randn(2, 5, 10, seed=2),
        "pooled_projections": randn(2, 14, seed=3),
        "timestep": torch.tensor([300.0, 800.0], dtype=torch.float64),
    },
    "wan": lambda: {
        "hidden_states": randn(2, 4, 2, 8, 8, seed=1),
        "encoder_hidden_states": randn(2, 5, 10, seed=2),
        "encoder_hidden_states_image": randn(2, 3, 14, seed=3),
        "timestep": torch.tensor([300, 800]),
    },
}


def run(model: nn.Module, family: str, dtype: torch.dtype = torch.float64) -> Tensor:
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in INPUTS[family]().items()}
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]
