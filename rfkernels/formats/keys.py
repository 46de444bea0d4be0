"""Names of a family of models in its original repository and in diffusers, without a model.

The tables are those of `rfkernels.adapters.names`; here are the families' own lines of the tables that
several share, and the names that are the same in both.
"""

import re
from functools import cache
from typing import NamedTuple

from rfkernels.adapters.names import FAMILIES

__all__ = ["Keys", "Match", "is_dropped", "is_linear"]

_BLOCK = r"single_transformer_blocks\.\d+"
# A family: marks of its table, names of diffusers in that table that are other families', names it shares
_TABLES = {
    "flux": (
        "x_embedder context_embedder",
        rf"time_guidance|stream_modulation|ff\w*\.linear|qkv_mlp|{_BLOCK}\.attn\.to_out$|distilled",
        "",
    ),
    "chroma": (
        "x_embedder context_embedder",
        rf"time_|stream_modulation|ff\w*\.linear|qkv_mlp|{_BLOCK}\.attn\.to_out$|norm\w*\.linear",
        "",
    ),
    "flux2": (
        "x_embedder context_embedder",
        rf"time_text|\.net\.|proj_mlp|{_BLOCK}\.proj_out|norm1\w*\.linear|\.norm\.linear|distilled",
        "",
    ),
    "flux3": ("x_embedders.image timestep_embedder.linear_1", "", ""),
    "sd3": ("pos_embed.proj time_text_embed.text_embedder.linear_1", "", "context_embedder"),
    "wan": ("condition_embedder.time_proj", "", "patch_embedding vace_patch_embedding"),
    "z-image": (
        "all_x_embedder.2-1",
        "",
        "x_pad_token cap_pad_token cap_embedder.# t_embedder.mlp.# *.#.attention_norm# *.#.ffn_norm# "
        "*.#.feed_forward.w# *.#.adaLN_modulation.0",
    ),
    "lumina2": (
        "time_caption_embed.timestep_embedder.linear_1",
        r"(layers|noise_refiner)\.\d+\.norm1$|context_refiner\.\d+\.norm1\.",
        "x_embedder *.#.ffn_norm#",
    ),
    "auraflow": ("time_step_proj.linear_1", "", "register_tokens"),
    "hidream": (
        "",
        "",
        "t_embedder.timestep_embedder.linear_# p_embedder.pooled_embedder.linear_# x_embedder.proj "
        "caption_projection.#.linear *.#.block.adaLN_modulation.1 *.#.block.attn1.* *.#.block.ff_i.gate "
        "*.#.block.ff_i.shared_experts.w# *.#.block.ff_i.experts.#.w# *.#.block.ff_t.w# final_layer.linear "
        "final_layer.adaLN_modulation.1",
    ),
    "qwen-image": (
        "",
        "",
        "img_in txt_in txt_norm time_text_embed.timestep_embedder.linear_# "
        "time_text_embed.addition_t_embedding *.#.img_mod.1 *.#.txt_mod.1 *.#.attn.* *.#.attn.to_out.0 "
        "*.#.img_mlp.net.0.proj *.#.txt_mlp.net.0.proj *.#.img_mlp.net.2 *.#.txt_mlp.net.2 norm_out.linear "
        "proj_out",
    ),
    "dit": (
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table",
        "",
        "transformer_blocks.#.norm1.emb.timestep_embedder.linear_# "
        "transformer_blocks.#.norm1.emb.class_embedder.embedding_table pos_embed",
    ),
    "pixart": (
        "",
        "",
        "scale_shift_table pos_embed.proj *.#.scale_shift_table *.#.attn#.* *.#.attn#.to_out.0 "
        "*.#.ff.net.0.proj *.#.ff.net.2 proj_out adaln_single.linear adaln_single.emb.*.linear_# "
        "caption_projection.linear_#",
    ),
}
_XLABS = re.compile(r"_lora\d|single_blocks\.#\.(qkv|proj)$")
_SCALES = re.compile(r"(query|key)_norm|distilled_guidance_layer\.norms\.\d+")
_LEAVES = ("", "weight", "bias", "scale")
_NOT_LINEAR = re.compile(r"(embedding_table|ff_i\.gate|addition_t_embedding)\.weight$")
_DROPPED = {"z-image": "norm_final.", "lumina2": "norm_final.", "flux3": "repa_projectors."}


class Match(NamedTuple):
    """A tensor: its original name, and the names in diffusers of its parts, rows one after the other.

    `index`: of the name that was asked for, among `parts`. `swap`: halves of the rows are exchanged.
    """

    original: str
    parts: tuple[str, ...]
    index: int = 0
    swap: bool = False


class _Rule(NamedTuple):
    original: str
    parts: tuple[str, ...]
    swap: bool


@cache
def _rules(family: str) -> list[tuple[_Rule, re.Pattern, tuple[re.Pattern, ...]]]:
    marks, _, same = _TABLES[family]
    lines = [line.split(maxsplit=1) for line in FAMILIES.get(marks, "").strip().splitlines()]
    rules = []
    for original, ours in (*lines, *((name, name) for name in same.split())):
        if not _XLABS.search(original):
            head, _, parts = ours.strip().rstrip("~").partition("[")
            names = tuple(head + part for part in parts.rstrip("]").split()) or (head,)
            rule = _Rule(original, names, ours.endswith("~"))
            rules.append((rule, _pattern(original), tuple(map(_pattern, names))))
    return rules


def _pattern(name: str) -> re.Pattern:
    return re.compile(re.escape(name).replace(r"\#", r"(\d+)").replace(r"\*", r"(\w+)"))


def _filled(name: str, wild: tuple[str, ...]) -> str:
    words = iter(wild)
    return re.sub(r"[#*]", lambda _: next(words), name)


def is_dropped(family: str, name: str) -> bool:
    """Whether diffusers has no place for an original tensor: it is not used for pictures."""
    return family in _DROPPED and name.startswith(_DROPPED[family])


def is_linear(name: str, dimensions: int) -> bool:
    """Whether a tensor is the weight of a linear layer: a matrix, and neither table nor router."""
    return dimensions == 2 and name.endswith(".weight") and not _NOT_LINEAR.search(name)


class Keys:
    """The names of one family; `width` is that of its tokens."""

    def __init__(self, family: str, width: int):
        self.family, self.width = family, width
        self._others = re.compile(_TABLES[family][1] or r"(?!)")

    def find(self, name: str, naming: str, rows: int = 0) -> Match | None:
        """What a name in a naming ("original", "diffusers") means; None if the family has no such name.

        Args:
            rows: of the tensor. The text's scale and shift of a last block of SD3 are exchanged.
        """
        layer, _, leaf = name.rpartition(".")
        for path, end in ((name, ""), (layer, leaf)):
            found = self._find(path, naming) if path and end in _LEAVES else None
            if found is not None:
                break
        else:
            return None
        rule, wild, index = found
        theirs, ours = _filled(rule.original, wild), [_filled(part, wild) for part in rule.parts]
        other = end
        if _SCALES.search(theirs) and end in ("scale", "weight"):
            end, other = "scale", "weight"
        last = ours[0].endswith("norm1_context.linear") and rows == 2 * self.width
        parts = tuple(f"{part}.{other}" if other else part for part in ours)
        return Match(f"{theirs}.{end}" if end else theirs, parts, index, rule.swap or last)

    def _find(self, path: str, naming: str) -> tuple[_Rule, tuple[str, ...], int] | None:
        for rule, original, parts in _rules(self.family):
            for index, pattern in enumerate((original,) if naming == "original" else parts):
                match = pattern.fullmatch(path)
                if match:
                    ours = [_filled(part, match.groups()) for part in rule.parts]
                    if not any(map(self._others.search, ours)):
                        return rule, match.groups(), index
        return None

    def rows(self, name: str, count: int, rows: int) -> list[int]:
        """Of each of `count` parts of a tensor: q as wide as the tokens; k and v alike; then the rest."""
        width = self.width
        if count == 1:
            return [rows]
        sizes = [width, *[(rows - width) // 2] * 2] if count == 3 else [*[width] * 3, rows - 3 * width]
        if sum(sizes) != rows or min(sizes) < 1:
            raise ValueError(f"{name} must have rows for {count} parts, q of {width}, got {rows}")
        return sizes
