"""FLUX.2 of diffusers."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from rfkernels.integrations.families.forward import Forward, refuse, rotation_of
from rfkernels.models import flux2
from rfkernels.models.layers import attend, joint

__all__ = ["BLOCKS"]


def double(
    block,
    hidden_states,
    encoder_hidden_states,
    temb_mod_img,
    temb_mod_txt,
    image_rotary_emb=None,
    joint_attention_kwargs=None,
) -> tuple[Tensor, Tensor]:
    image, text, modulations = hidden_states, encoder_hidden_states, (temb_mod_img, temb_mod_txt)
    attention = attention_of(block.attn, joint_attention_kwargs, text.shape[1])
    rotation = None if image_rotary_emb is None else rotation_of(image_rotary_emb)
    return flux2.double_block(block, image, text, *modulations, rotation, attention=attention)


def single(
    block,
    hidden_states,
    encoder_hidden_states,
    temb_mod,
    image_rotary_emb=None,
    joint_attention_kwargs=None,
    split_hidden_states=False,
    text_seq_len=None,
) -> tuple[Tensor, Tensor] | Tensor:
    attention = attention_of(block.attn, joint_attention_kwargs, 0)
    rotation = None if image_rotary_emb is None else rotation_of(image_rotary_emb)
    x, text = hidden_states, text_seq_len
    if encoder_hidden_states is not None:
        x, text = joint(encoder_hidden_states, hidden_states), encoder_hidden_states.shape[1]
    x = flux2.single_block(block, x, temb_mod, rotation, attention=attention)
    return (x[:, :text], x[:, text:]) if split_hidden_states else x


KEPT = ("kv_cache", "kv_cache_mode", "num_ref_tokens", "num_txt_tokens")


def attention_of(attn: nn.Module, arguments: dict | None, text: int) -> Callable[..., Tensor]:
    """The attention that a processor of klein-kv has by `joint_attention_kwargs`."""
    arguments = arguments or {}
    keeps = "KV" in type(getattr(attn, "processor", None)).__name__
    refuse(joint_attention_kwargs={k: v for k, v in arguments.items() if not keeps or k not in KEPT})
    cache, mode = arguments.get("kv_cache"), arguments.get("kv_cache_mode")
    references = arguments.get("num_ref_tokens", 0)
    if mode == "extract" and references > 0:
        text = arguments.get("num_txt_tokens", text)
        return partial(flux2.attend_first, text=text, references=references, keep=_keep(cache))
    if mode == "cached" and cache is not None:
        return partial(flux2.attend_later, kept=lambda _: cache.get())
    return attend


def _keep(cache) -> Callable[[nn.Module, tuple[Tensor, Tensor]], None]:
    return lambda _, pair: None if cache is None else cache.store(*pair)


REGIONS = ("norm_modulate", "qkv_norm_rope", "attention", "swiglu", "gated_residual")
BLOCKS = {
    "Flux2TransformerBlock": Forward(
        double, ("Flux2AttnProcessor", "Flux2KVAttnProcessor"), (*REGIONS, "gated_residual_norm_modulate")
    ),
    "Flux2SingleTransformerBlock": Forward(
        single, ("Flux2ParallelSelfAttnProcessor", "Flux2KVParallelSelfAttnProcessor"), REGIONS
    ),
}
