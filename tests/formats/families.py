"""Tiny random models of every family that `detect` knows, as files."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from rfkernels.formats.writer import write_safetensors
from tests.adapters.models import SIZES as ADAPTED

_RENAMED = {"z_image": "z-image", "qwen": "qwen-image"}
SIZES = {_RENAMED.get(name, name): size for name, size in ADAPTED.items()} | {
    "wan-vace": {
        "class": "WanVACETransformer3DModel",
        "converter": "convert_wan_transformer_to_diffusers",
        "config": {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 10,
            "freq_dim": 12,
            "ffn_dim": 20,
            "num_layers": 4,
            "rope_max_seq_len": 32,
            "vace_layers": [0, 2],
            "vace_in_channels": 6,
        },
    },
    "flux3": {
        "class": "Flux3Transformer2DModel",
        "converter": "convert_flux3_transformer_checkpoint_to_diffusers",
        "config": {
            "in_channels": 8,
            "cond_in_channels": 6,
            "num_layers": 2,
            "num_single_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 10,
            "timestep_channels": 12,
            "axes_dims_rope": (4, 4, 4, 4),
            "flow_map": True,
        },
    },
    "chroma": {
        "class": "ChromaTransformer2DModel",
        "converter": "convert_chroma_transformer_checkpoint_to_diffusers",
        "constants": {"inner_dim = 3072": "inner_dim = 32"},
        "config": {
            "in_channels": 8,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 10,
            "axes_dims_rope": (4, 6, 6),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 20,
            "approximator_layers": 2,
        },
    },
    "hidream": {
        "class": "HiDreamImageTransformer2DModel",
        "converter": "convert_hidream_transformer_to_diffusers",
        "config": {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": [10, 12],
            "text_emb_dim": 14,
            "num_routed_experts": 2,
            "axes_dims_rope": (4, 4),
            "max_resolution": (8, 8),
            "llama_layers": [0, 1, 2],
        },
    },
    "dit": {
        "class": "DiTTransformer2DModel",
        "converter": None,
        "config": {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "num_embeds_ada_norm": 7,
            "sample_size": 8,
        },
    },
    "pixart": {
        "class": "PixArtTransformer2DModel",
        "converter": None,
        "config": {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "caption_channels": 10,
            "sample_size": 8,
            "use_additional_conditions": True,
        },
    },
}
CONVERTED = [family for family, size in SIZES.items() if size["converter"]]


def class_of(family: str):
    return getattr(pytest.importorskip("diffusers"), SIZES[family]["class"])


def make(family: str, config: dict) -> nn.Module:
    with warnings.catch_warnings():  # diffusers' Chroma uses names that diffusers deprecates
        warnings.simplefilter("ignore", FutureWarning)
        return class_of(family)(**config)


def tiny(family: str, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A model whose parameters are all random."""
    model = make(family, SIZES[family]["config"] | changes).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for tensor in model.parameters():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model


def write(model: nn.Module, path: Path, prefix: str = "", **metadata: str) -> Path:
    tensors = [(prefix + name, tensor) for name, tensor in model.state_dict().items()]
    write_safetensors(path, tensors, metadata)
    return path


def same(found, expected) -> None:
    """Same names, same bits."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
