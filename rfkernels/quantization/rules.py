"""Which layers of diffusers' models and ours stay as they are, and which are modulation.

Patterns are of `fnmatch`, for whole dotted names. `keep`: embedders of tokens, text and time, and the last
projections: few weights, at the ends of the network, where an error is not averaged out. `modulation`:
linears that make scales, shifts and gates from one vector a sample: many weights, one row of tokens, and
errors that reach every token.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

__all__ = ["Rules", "matches", "rules_of"]


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


def rules_of(model: nn.Module) -> Rules:
    """The rules of the model's class, or general ones for a class that has none here."""
    return next((_TABLE[c.__name__] for c in type(model).__mro__ if c.__name__ in _TABLE), _OTHERS)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
