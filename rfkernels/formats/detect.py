"""Which model a file holds: family, variant, naming and configuration, from names and shapes alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rfkernels.formats import gguf
from rfkernels.formats.configs import CLASSES, Shapes, describe
from rfkernels.formats.container import open_checkpoint
from rfkernels.formats.keys import Keys, is_dropped

__all__ = ["PREFIXES", "Architecture", "Listing", "detect", "diffusers_shapes", "keys_of", "listing"]

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "net.", "_orig_mod.")
PREFIXES += ("velocity_model.",)
# Modules that a family alone has, in this order: the first whose marks are all there
_MARKS = """
flux2       original   single_stream_modulation.lin
flux3       original   early_stream_modulations.image.lin
chroma      original   distilled_guidance_layer.in_proj double_blocks.0.img_attn.proj
flux        original   img_in double_blocks.0.img_attn.norm.key_norm
sd3         original   joint_blocks.0.context_block.adaLN_modulation.1
wan         original   head.modulation time_projection.1
z-image     original   layers.0.adaLN_modulation.0 x_embedder
lumina2     original   layers.0.adaLN_modulation.1 cap_embedder.0 x_embedder
auraflow    original   double_layers.0.attn.w2q
dit         original   blocks.0.adaLN_modulation.1 y_embedder.embedding_table
flux2       diffusers  single_stream_modulation.linear
flux3       diffusers  early_stream_modulations.image.linear
chroma      diffusers  distilled_guidance_layer.in_proj transformer_blocks.0.attn.norm_q
flux        diffusers  x_embedder context_embedder time_text_embed.text_embedder.linear_1
sd3         diffusers  pos_embed.proj time_text_embed.text_embedder.linear_1
wan         diffusers  condition_embedder.time_proj scale_shift_table
hidream     diffusers  double_stream_blocks.0.block.adaLN_modulation.1
z-image     diffusers  layers.0.adaLN_modulation.0 all_x_embedder.2-1
lumina2     diffusers  time_caption_embed.timestep_embedder.linear_1
auraflow    diffusers  time_step_proj.linear_1 joint_transformer_blocks.0.norm1.linear
qwen-image  diffusers  transformer_blocks.0.img_mod.1 txt_norm
dit         diffusers  transformer_blocks.0.norm1.emb.class_embedder.embedding_table
pixart      diffusers  adaln_single.linear pos_embed.proj
"""
_TOKENS = ("img_in", "x_embedder", "x_embedder.proj", "pos_embed.proj", "patch_embedding", "init_x_linear")
_TOKENS += ("all_x_embedder.2-1", "emb_in.image", "x_embedders.image")


class Listing(NamedTuple):
    """What a file says of its tensors before they are read: shapes, dtypes (as torch's or the file's words),
    the strings of its header."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype | str]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A model as a file has it.

    Args:
        family: "flux", "flux2", "flux3", "chroma", "sd3", "wan", "hidream", "z-image", "lumina2", "auraflow",
            "qwen-image", "dit" (and SiT) or "pixart".
        variant: the published model with these shapes, "" if there is none. Models that differ in their
            numbers alone have one name: Kontext is "dev".
        naming: "diffusers" or "original"; "diffusers" where both are the same (HiDream, Qwen-Image).
        prefix: of the names in the file.
        config: keyword arguments of the diffusers class, as far as shapes tell.
    """

    family: str
    variant: str
    naming: str
    prefix: str
    config: dict[str, Any]

    @property
    def class_name(self) -> str:
        """The class of diffusers."""
        return "WanVACETransformer3DModel" if self.variant.startswith("vace") else CLASSES[self.family]


def listing(source: str | Path | Mapping[str, Tensor]) -> Listing:
    """Names, shapes and dtypes of a safetensors file, shards, a GGUF file, or tensors by name."""
    if isinstance(source, (str, Path)) and Path(source).is_file() and gguf.is_gguf(source):
        values, tensors = gguf.read_header(source)[:2]
        shapes, dtypes = {}, {}
        for name, (shape, kind, *_) in tensors.items():
            shapes[name] = tuple(values.get(f"comfy.gguf.orig_shape.{name}", shape))
            known = gguf.TYPES.get(kind, f"type {kind}")
            dtypes[name] = getattr(known, "name", known)
        return Listing(shapes, dtypes, dict(values))
    found = open_checkpoint(source)
    return Listing({n: found.shape(n) for n in found}, {n: found.dtype(n) for n in found}, found.metadata)


def detect(source: str | Path | Mapping[str, Tensor] | Listing) -> Architecture:
    """The model that a checkpoint holds; no tensor is read.

    Raises:
        ValueError: it holds none of the families known here, or lacks tensors that tell its configuration.
    """
    shapes = (source if isinstance(source, Listing) else listing(source)).shapes
    found = _family(set(shapes), "", 3)
    if found is None:
        families, some = ", ".join(sorted(CLASSES)), sorted(shapes)[:4]
        raise ValueError(f"checkpoint: a model of {families} is required, got {len(shapes)} keys like {some}")
    family, naming, prefix = found
    shapes = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
    keys = keys_of(family, shapes)
    variant, config = describe(family, Shapes(family, diffusers_shapes(keys, naming, shapes)))
    return Architecture(family, variant, naming, prefix, config)


def _family(names: set[str], prefix: str, depth: int) -> tuple[str, str, str] | None:
    """Family, naming and prefix: the first prefix, or prefixes one after the other, under which marks are."""
    modules = names | {name.rpartition(".")[0] for name in names}
    for family, naming, *marks in map(str.split, _MARKS.strip().splitlines()):
        if modules.issuperset(marks):
            return family, naming, prefix
    for known in PREFIXES if depth else ():
        inner = {name.removeprefix(known) for name in names if name.startswith(known)}
        found = _family(inner, prefix + known, depth - 1) if inner else None
        if found is not None:
            return found
    return None


def keys_of(family: str, shapes: Mapping[str, tuple[int, ...]]) -> Keys:
    """The names of a family at the width that an embedder of tokens has."""
    rows = (shapes.get(f"{name}.{leaf}") for leaf in ("bias", "weight") for name in _TOKENS)
    return Keys(family, next((shape[0] for shape in rows if shape), 0))


def diffusers_shapes(
    keys: Keys, naming: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shapes by the names of diffusers; unknown names keep theirs."""
    if naming == "diffusers":
        return dict(shapes)
    made: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        match = keys.find(name, naming, shape[0] if shape else 0)
        if match is None or is_dropped(keys.family, name):
            made[name] = shape
            continue
        rows = keys.rows(name, len(match.parts), shape[0]) if shape else [0]
        made |= {part: (n, *shape[1:]) for part, n in zip(match.parts, rows, strict=True)}
    return made
