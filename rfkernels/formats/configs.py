"""Configurations of diffusers' models, and the names of published ones, from shapes by diffusers' names."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["CLASSES", "Shapes", "describe"]


class Shapes:
    """Shapes of a model's tensors: rows and columns of layers, counts of blocks."""

    def __init__(self, family: str, shapes: Mapping[str, tuple[int, ...]]):
        self.family, self._shapes = family, shapes

    def __contains__(self, layer: str) -> bool:
        return any(name in self._shapes for name in (layer, f"{layer}.weight", f"{layer}.bias"))

    def of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            ValueError: the file lacks it.
        """
        if not self._shapes.get(name):
            raise ValueError(f"checkpoint: {name} of a {self.family} model is required, found none")
        return self._shapes[name]

    def rows(self, layer: str) -> int:
        """Outputs; of the bias, where there is one: a weight may be packed."""
        return self.of(next((n for n in (f"{layer}.bias",) if n in self._shapes), f"{layer}.weight"))[0]

    def columns(self, layer: str) -> int:
        return math.prod(self.of(f"{layer}.weight")[1:])

    def count(self, blocks: str) -> int:
        found = (re.match(rf"{re.escape(blocks)}\.(\d+)\.", name) for name in self._shapes)
        return 1 + max((int(match[1]) for match in found if match), default=-1)


def describe(family: str, shapes: Shapes) -> tuple[str, dict[str, Any]]:
    """The published variant, "" if there is none, and keyword arguments of the class."""
    return _DESCRIBERS[family](shapes)


def _heads(s: Shapes, width: int, norm: str | None, size: int) -> dict[str, int]:
    """Heads of the size that their norm has; of `size` where there is no norm of heads."""
    size = s.rows(norm) if norm and norm in s else size
    size = size if width % size == 0 else width
    return {"attention_head_dim": size, "num_attention_heads": width // size}


def _flux_blocks(s: Shapes) -> dict[str, Any]:
    ends = s.columns("x_embedder"), s.rows("proj_out")
    config = {"in_channels": ends[0], **({} if ends[0] == ends[1] else {"out_channels": ends[1]})}
    config |= {"num_layers": s.count("transformer_blocks")}
    config |= {"num_single_layers": s.count("single_transformer_blocks")}
    config |= _heads(s, s.rows("x_embedder"), "transformer_blocks.0.attn.norm_q", 128)
    return config | {"joint_attention_dim": s.columns("context_embedder")}


def _flux(s):
    guidance = "time_text_embed.guidance_embedder.linear_1" in s
    config = _flux_blocks(s) | {"guidance_embeds": guidance}
    config |= {"pooled_projection_dim": s.columns("time_text_embed.text_embedder.linear_1")}
    published = (config["num_layers"], config["num_single_layers"], s.rows("x_embedder")) == (19, 38, 3072)
    variants = {64: "dev" if guidance else "schnell", 128: "depth-canny", 384: "fill"}
    return variants.get(config["in_channels"], "") if published else "", config


def _flux2(s):
    width = s.rows("x_embedder")
    config = _flux_blocks(s) | {"guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1" in s}
    config |= {"timestep_guidance_channels": s.columns("time_guidance_embed.timestep_embedder.linear_1")}
    config |= {"mlp_ratio": s.rows("transformer_blocks.0.ff.linear_in") / 2 / width}
    sizes = {(6144, 8, 48): "dev", (3072, 5, 20): "klein-4b", (4096, 8, 24): "klein-9b"}
    return sizes.get((width, config["num_layers"], config["num_single_layers"]), ""), config


def _flux3(s):
    width = s.rows("x_embedders.image")
    config = {
        "in_channels": s.columns("x_embedders.image"),
        "cond_in_channels": s.columns("x_embedders.image_cond"),
        "num_layers": s.count("txt_mode_blocks"),
        "num_single_layers": s.count("single_transformer_blocks"),
        **_heads(s, width, "txt_mode_blocks.0.attn.norm_q", 128),
        "joint_attention_dim": s.columns("context_embedder"),
        "timestep_channels": s.columns("timestep_embedder.linear_1"),
        "mlp_ratio": s.rows("txt_mode_blocks.0.ff.linear_in") / 2 / width,
        "flow_map": "target_timestep_embedder.linear_1" in s,
    }
    return "distilled" if config["flow_map"] else "base", config


def _chroma(s):
    layers = "distilled_guidance_layer"
    config = _flux_blocks(s) | {"approximator_num_channels": s.columns(f"{layers}.in_proj")}
    config |= {"approximator_hidden_dim": s.rows(f"{layers}.in_proj")}
    config |= {"approximator_layers": s.count(f"{layers}.layers")}
    return "", config


def _sd3(s):
    width, channels, patch, _ = s.of("pos_embed.proj.weight")
    norm, blocks = "transformer_blocks.0.attn.norm_q", s.count("transformer_blocks")
    config = {
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": blocks,
        **_heads(s, width, norm, 64),
        "joint_attention_dim": s.columns("context_embedder"),
        "caption_projection_dim": width,
        "pooled_projection_dim": s.columns("time_text_embed.text_embedder.linear_1"),
        "out_channels": s.rows("proj_out") // patch**2,
        "pos_embed_max_size": math.isqrt(s.of("pos_embed.pos_embed")[1]),
        "dual_attention_layers": tuple(i for i in range(blocks) if f"transformer_blocks.{i}.attn2.to_q" in s),
        "qk_norm": "rms_norm" if norm in s else None,
    }
    sizes = {(24, 1536, 192): "medium", (24, 1536, 384): "3.5-medium", (38, 2432, 192): "3.5-large"}
    return sizes.get((blocks, width, config["pos_embed_max_size"]), ""), config


def _wan(s):
    width, channels, *patch = s.of("patch_embedding.weight")
    image = "condition_embedder.image_embedder.norm1"
    config = {
        "patch_size": tuple(patch),
        **_heads(s, width, None, 128),
        "in_channels": channels,
        "out_channels": s.rows("proj_out") // math.prod(patch),
        "text_dim": s.columns("condition_embedder.text_embedder.linear_1"),
        "freq_dim": s.columns("condition_embedder.time_embedder.linear_1"),
        "ffn_dim": s.rows("blocks.0.ffn.net.0.proj"),
        "num_layers": s.count("blocks"),
        "cross_attn_norm": "blocks.0.norm2" in s,
        "image_dim": s.rows(image) if image in s else None,
        "added_kv_proj_dim": width if "blocks.0.attn2.add_k_proj" in s else None,
    }
    hints, layers = s.count("vace_blocks"), config["num_layers"]
    if hints:  # a block of hints for every so many layers
        config |= {"vace_layers": list(range(0, layers, max(1, layers // hints)))[:hints]}
        config |= {"vace_in_channels": s.of("vace_patch_embedding.weight")[1]}
        return {(1536, 30): "vace-1.3b", (5120, 40): "vace-14b"}.get((width, layers), "vace"), config
    sizes = {
        (1536, 16, False): "t2v-1.3b",
        (5120, 16, False): "t2v-14b",
        (5120, 36, True): "i2v-14b-2.1",
        (5120, 36, False): "i2v-14b-2.2",
        (3072, 48, False): "ti2v-5b",
    }
    return sizes.get((width, channels, image in s), ""), config


def _hidream(s):
    double, single = s.count("double_stream_blocks"), s.count("single_stream_blocks")
    captions = s.count("caption_projection")
    config = {
        "patch_size": 2,  # channels times its square is all that shapes tell
        "in_channels": s.columns("x_embedder.proj") // 4,
        "out_channels": s.rows("final_layer.linear") // 4,
        "num_layers": double,
        "num_single_layers": single,
        **_heads(s, s.rows("x_embedder.proj"), None, 128),
        "caption_channels": [s.columns(f"caption_projection.{i}.linear") for i in (captions - 1, 0)],
        "text_emb_dim": s.columns("p_embedder.pooled_embedder.linear_1"),
        "num_routed_experts": s.rows("double_stream_blocks.0.block.ff_i.gate"),
        "llama_layers": [min(i, 31) for i in range(double + single)],
    }
    return "i1" if (double, single) == (16, 32) else "", config


def _z_image(s):
    width, norm = s.rows("all_x_embedder.2-1"), "layers.0.attention.norm_q"
    heads = _heads(s, width, norm, 128)["num_attention_heads"]
    axis = width // heads * 3 // 16 * 2  # no shape tells the axes of RoPE, the class wants their sum to fit
    config = {
        "axes_dims": [width // heads - 2 * axis, axis, axis],
        "in_channels": s.columns("all_x_embedder.2-1") // 4,
        "dim": width,
        "n_layers": s.count("layers"),
        "n_refiner_layers": s.count("noise_refiner"),
        "n_heads": heads,
        "n_kv_heads": heads,
        "qk_norm": norm in s,
        "cap_feat_dim": s.rows("cap_embedder.0"),
    }
    return "z-image" if (width, config["n_layers"]) == (3840, 30) else "", config


def _lumina2(s):
    width, hidden = s.rows("x_embedder"), s.rows("layers.0.feed_forward.linear_1")
    heads = _heads(s, width, "layers.0.attn.norm_q", 96)
    multiple = 256 if hidden == -(-4 * width // 256) * 256 else hidden
    config = {
        "in_channels": s.columns("x_embedder") // 4,
        "out_channels": s.rows("norm_out.linear_2") // 4,
        "hidden_size": width,
        "num_layers": s.count("layers"),
        "num_refiner_layers": s.count("noise_refiner"),
        "num_attention_heads": heads["num_attention_heads"],
        "num_kv_heads": s.rows("layers.0.attn.to_k") // heads["attention_head_dim"],
        "multiple_of": multiple,
        "cap_feat_dim": s.rows("time_caption_embed.caption_embedder.0"),
    }
    return "lumina-image-2.0" if (width, config["num_layers"]) == (2304, 26) else "", config


def _auraflow(s):
    width = s.rows("pos_embed.proj")
    config = {
        "in_channels": s.columns("pos_embed.proj") // 4,
        "num_mmdit_layers": s.count("joint_transformer_blocks"),
        "num_single_dit_layers": s.count("single_transformer_blocks"),
        **_heads(s, width, None, 256),
        "joint_attention_dim": s.columns("context_embedder"),
        "caption_projection_dim": width,
        "out_channels": s.rows("proj_out") // 4,
        "pos_embed_max_size": s.of("pos_embed.pos_embed")[1],
    }
    return "auraflow" if (width, config["num_single_dit_layers"]) == (3072, 32) else "", config


def _qwen_image(s):
    config = {
        "in_channels": s.columns("img_in"),
        "out_channels": s.rows("proj_out") // 4,
        "num_layers": s.count("transformer_blocks"),
        **_heads(s, s.rows("img_in"), "transformer_blocks.0.attn.norm_q", 128),
        "joint_attention_dim": s.columns("txt_in"),
    }
    if "time_text_embed.addition_t_embedding" in s:
        config |= {"use_additional_t_cond": True, "use_layer3d_rope": True}
    return "qwen-image" if (config["num_layers"], s.rows("img_in")) == (60, 3072) else "", config


def _dit(s):
    width, channels, patch, _ = s.of("pos_embed.proj.weight")
    heads = {1152: 16, 1024: 16, 768: 12, 384: 6}.get(width, width // 64 if width % 64 == 0 else 1)
    table = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table"
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": s.rows("proj_out_2") // patch**2,
        "num_layers": s.count("transformer_blocks"),
        "num_embeds_ada_norm": s.rows(table) - 1,
        "patch_size": patch,
    }
    sizes = {(1152, 28): "xl", (1024, 24): "l", (768, 12): "b", (384, 12): "s"}
    name = sizes.get((width, config["num_layers"]), "")
    return f"{name}-{patch}" if name else "", config


def _pixart(s):
    width, channels, patch, _ = s.of("pos_embed.proj.weight")
    additional = "adaln_single.emb.resolution_embedder.linear_1" in s
    config = {
        **_heads(s, width, None, 72),
        "in_channels": channels,
        "out_channels": s.rows("proj_out") // patch**2,
        "num_layers": s.count("transformer_blocks"),
        "cross_attention_dim": s.columns("transformer_blocks.0.attn2.to_k"),
        "patch_size": patch,
        "caption_channels": s.columns("caption_projection.linear_1"),
        "use_additional_conditions": additional,
    }
    published = (width, config["num_layers"]) == (1152, 28)
    return ("alpha-1024" if additional else "sigma") if published else "", config


CLASSES = {
    "flux": "FluxTransformer2DModel",
    "flux2": "Flux2Transformer2DModel",
    "flux3": "Flux3Transformer2DModel",
    "chroma": "ChromaTransformer2DModel",
    "sd3": "SD3Transformer2DModel",
    "wan": "WanTransformer3DModel",
    "hidream": "HiDreamImageTransformer2DModel",
    "z-image": "ZImageTransformer2DModel",
    "lumina2": "Lumina2Transformer2DModel",
    "auraflow": "AuraFlowTransformer2DModel",
    "qwen-image": "QwenImageTransformer2DModel",
    "dit": "DiTTransformer2DModel",
    "pixart": "PixArtTransformer2DModel",
}
_DESCRIBERS: dict[str, Callable[[Shapes], tuple[str, dict[str, Any]]]] = {
    "flux": _flux,
    "flux2": _flux2,
    "flux3": _flux3,
    "chroma": _chroma,
    "sd3": _sd3,
    "wan": _wan,
    "hidream": _hidream,
    "z-image": _z_image,
    "lumina2": _lumina2,
    "auraflow": _auraflow,
    "qwen-image": _qwen_image,
    "dit": _dit,
    "pixart": _pixart,
}
