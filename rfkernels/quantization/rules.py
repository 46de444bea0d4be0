"""Which layers of diffusers' models and ours stay as they are, and which are modulation.

Patterns are of `fnmatch`, for whole dotted names. `keep`: embedders of tokens, text and time, and the last
projections: few weights, at the ends of the network, where an error is not averaged out. `modulation`:
linears that make scales, shifts and gates from one vector a sample: many weights, one row of tokens, and
errors that reach every token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from rfkernels.quantization.int8 import largest_rotation
from rfkernels.quantization.weight import FORMATS

__all__ = ["Choice", "Rules", "matches", "rules_of"]


@dataclass(frozen=True)
class Rules:
    keep: tuple[str, ...]
    modulation: tuple[str, ...] = ()


_ENDS = ("x_embedder", "context_embedder", "norm_out.*", "proj_out")
_TABLE = {
    "FluxTransformer2DModel": Rules(
        (*_ENDS, "time_text_embed.*"),
        (
            "transformer_blocks.*.norm1.linear",
            "transformer_blocks.*.norm1_context.linear",
            "single_transformer_blocks.*.norm.linear",
        ),
    ),
    "Flux2Transformer2DModel": Rules((*_ENDS, "time_guidance_embed.*"), ("*_stream_modulation*.linear",)),
    "SD3Transformer2DModel": Rules(
        ("context_embedder", "time_text_embed.*", "norm_out.*", "proj_out"),
        ("transformer_blocks.*.norm1.linear", "transformer_blocks.*.norm1_context.linear"),
    ),
    "QwenImageTransformer2DModel": Rules(
        ("img_in", "txt_in", "time_text_embed.*", "norm_out.*", "proj_out"),
        ("transformer_blocks.*.img_mod.1", "transformer_blocks.*.txt_mod.1"),
    ),
    "WanTransformer3DModel": Rules(("condition_embedder.*", "proj_out")),
    "AuraFlowTransformer2DModel": Rules(
        ("pos_embed.*", "context_embedder", "time_step_*", "norm_out.*", "proj_out"),
        ("*joint_transformer_blocks.*.norm1*.linear", "single_transformer_blocks.*.norm1.linear"),
    ),
    "Lumina2Transformer2DModel": Rules(
        ("x_embedder", "time_caption_embed.*", "norm_out.*"),
        ("layers.*.norm1.linear", "noise_refiner.*.norm1.linear"),
    ),
    "EmojiFlow": Rules(("image_in", "out", "text.*", "time.*", "pooled"), ("modulation",)),
    "PixArtTransformer2DModel": Rules(("adaln_single.*", "caption_projection.*", "proj_out")),
}
_OTHERS = Rules(
    ("*embed*", "*_in", "norm_out.*", "*norm_final*", "*final_layer*", "proj_out", "proj_out_[12]", "head*"),
    ("*norm*.linear", "*_mod.*", "*modulation*", "*adaln*", "*adaLN*"),
)


def rules_of(model: nn.Module | str) -> Rules:
    """The rules of the model's class, or of a class by name; general ones for a class that has none here."""
    names = [model] if isinstance(model, str) else [c.__name__ for c in type(model).__mro__]
    return next((_TABLE[name] for name in names if name in _TABLE), _OTHERS)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Choice:
    """Which format a weight gets: arguments of `rfkernels.quantize`; `high` are the patterns that stay.

    Raises:
        ValueError: a method or modulation that is no format.
    """

    method: str
    high: tuple[str, ...]
    modulations: tuple[str, ...]
    modulation: str | None = None
    min_size: int = 1 << 14
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for format in (self.method, self.modulation):
            if format is not None and format not in FORMATS:
                raise ValueError(f"quantize: the method must be one of {', '.join(FORMATS)}, got {format!r}")

    @classmethod
    def of(
        cls,
        model: nn.Module | str,
        method: str,
        skip: Sequence[str],
        keep: Sequence[str] | None,
        **more: Any,
    ) -> "Choice":
        """With the rules of a model."""
        rules = rules_of(model)
        return cls(method, (*skip, *(rules.keep if keep is None else keep)), rules.modulation, **more)

    def format(self, names: Sequence[str], weight: Tensor) -> tuple[str | None, str]:
        """The format of the weight of these layers; or None, and why it stays."""
        if any(matches(name, self.high) for name in names):
            return None, "kept: sensitive, or skipped"
        if not weight.is_floating_point() or weight.itemsize == 1:
            return None, f"kept: {weight.dtype}"
        if weight.numel() < self.min_size:
            return None, f"kept: fewer than {self.min_size} weights"
        modulates = any(matches(name, self.modulations) for name in names)
        format = self.modulation if modulates else self.method
        reason = "kept: modulation" if format is None else self._misfit(format, weight.shape[1])
        return None if reason else format, reason

    def options_of(self, format: str) -> dict[str, Any]:
        return self.options if format == self.method else {}

    def _misfit(self, format: str, width: int) -> str:
        options = self.options_of(format)
        group = options.get("group", 64) if format in ("w4a16", "w4a8", "svdq-int4") else 1
        rotation = options.get("rotation") or largest_rotation(width) or 16
        if format in ("int8-convrot", "w4a8") and width % rotation:
            return f"kept: a rotation of {rotation} does not divide {width} inputs"
        return f"kept: a group of {group} does not divide {width} inputs" if width % (group or 2) else ""
