"""The attention of diffusers' models, computed by `rfkernels.ops.attention`.

>>> rfkernels.use_attention(pipe.transformer, "auto")          # any model; "full", "int8", "fp8", "auto"
>>> register_attention_backend()                               # or diffusers' way, for models that dispatch
>>> pipe.transformer.set_attention_backend("rfkernels_auto")
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from rfkernels.ops.attention import attention

__all__ = ["BACKENDS", "register_attention_backend", "stop_using_attention", "use_attention"]

BACKENDS = {"rfkernels": "full", "rfkernels_int8": "int8", "rfkernels_fp8": "fp8", "rfkernels_auto": "auto"}
_NAMES = {precision: name for name, precision in BACKENDS.items()}
_MOST_CAUSAL = 1 << 24  # queries times keys of the mask that is_causal becomes
_BEFORE = "_rfkernels_before"  # of a processor that dispatches: the back end that it had


def register_attention_backend() -> tuple[str, ...]:
    """Adds the back ends `BACKENDS` to diffusers' dispatcher, and returns their names.

    Then `model.set_attention_backend("rfkernels")` works, and the context `attention_backend`. A second call
    changes nothing. diffusers 0.42 makes the back end of one model that of every model that has none.

    Raises:
        ImportError: no diffusers.
        RuntimeError: a diffusers whose dispatcher is another; says what was required.
    """
    dispatch = _import("diffusers.models.attention_dispatch")
    names, registry = (
        getattr(dispatch, n, None) for n in ("AttentionBackendName", "_AttentionBackendRegistry")
    )
    required = (
        (names, ("_member_names_", "_member_map_", "_value2member_map_")),
        (registry, ("register", "_backends")),
    )
    missing = [part for owner, parts in required for part in parts if not hasattr(owner, part)]
    if missing or not issubclass(names, str):
        raise RuntimeError(
            "register_attention_backend: required a diffusers (as 0.42) whose models.attention_dispatch has "
            "AttentionBackendName, an enumeration of strings, and _AttentionBackendRegistry.register; got "
            f"{import_module('diffusers').__version__} without {', '.join(missing) or 'strings'}"
        )
    for name, precision in BACKENDS.items():
        member = names._value2member_map_.get(name) or _add_member(names, name)
        if member not in registry._backends:
            registry.register(member, constraints=[])(_backend(precision))
    return tuple(BACKENDS)


def use_attention(model: nn.Module, precision: str = "full") -> nn.Module:
    """Makes every attention of a diffusers model one of `rfkernels.ops.attention`, and returns the model.

    Processors that ask diffusers' dispatcher get our back end; those that call torch's attention themselves
    (SD3, HiDream, AuraFlow, Lumina 2, and the plain one of DiT and PixArt) are replaced by ours, which
    compute the same. A second call changes the precision. `stop_using_attention` gives the model back what it
    had.

    Args:
        precision: "full", "int8", "fp8" or "auto", as of `attention`.

    Raises:
        ValueError: another precision; a processor that is not known, by its name, or none at all: the model
            is then as it was.
        ImportError, RuntimeError: as `register_attention_backend`.
    """
    if precision not in _NAMES:
        raise ValueError(f"use_attention: precision must be one of {', '.join(_NAMES)}, got {precision!r}")
    register_attention_backend()
    replacements = _replacements()
    found = list(_attentions(model))
    unknown = {
        type(p).__name__ for _, p in found if not (_ours(p) or _dispatches(p) or type(p) in replacements)
    }
    if unknown or not found:
        what = f"the processor {', '.join(sorted(unknown))}" if unknown else "no attention processor"
        known = ", ".join(sorted(cls.__name__ for cls in replacements))
        raise ValueError(
            f"use_attention: {type(model).__name__} has {what}; expected {known}, or processors that ask "
            "diffusers' dispatcher"
        )
    backend = _import("diffusers.models.attention_dispatch").AttentionBackendName(_NAMES[precision])
    for module, processor in found:
        if _ours(processor):
            processor.precision = precision
        elif _dispatches(processor):
            if not hasattr(processor, _BEFORE):
                setattr(processor, _BEFORE, processor._attention_backend)
            processor._attention_backend = backend
        else:
            module.processor = replacements[type(processor)](processor, precision)
    return model


def stop_using_attention(model: nn.Module) -> nn.Module:
    """Gives a model the processors and back ends that it had before `use_attention`."""
    for module, processor in _attentions(model):
        if _ours(processor):
            module.processor = processor.replaced
        elif hasattr(processor, _BEFORE):
            processor._attention_backend = getattr(processor, _BEFORE)
            delattr(processor, _BEFORE)
    return model


def _import(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is required (pip install diffusers): {error}") from error


def _add_member(names: type, value: str) -> Any:
    """A new member of a closed enumeration of strings."""
    name = value.upper()
    member = str.__new__(names, value)
    member._name_, member._value_, member.__objclass__ = name, value, names
    names._member_names_.append(name)
    names._member_map_[name] = names._value2member_map_[value] = member
    type.__setattr__(names, name, member)
    return member


def _backend(precision: str) -> Callable[..., Tensor]:
    """A back end of the dispatcher, which reads the names of its arguments."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        if dropout_p or return_lse or _parallel_config is not None:
            raise ValueError(
                "rfkernels: attention has no dropout, context parallelism or return_lse here, got dropout_p "
                f"{dropout_p}, {'a' if _parallel_config else 'no'} parallel_config, return_lse {return_lse}"
            )
        bias = _bias(query, key, attn_mask, is_causal)
        return attention(query, key, value, bias=bias, scale=scale, layout="blhd", precision=precision)

    return attend


def _bias(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """A mask of torch's attention (bool or additive), or that of causal attention, as `bias`."""
    rows, keys = q.shape[1], k.shape[1]
    if is_causal:
        if mask is not None or rows * keys > _MOST_CAUSAL:
            raise ValueError(
                f"rfkernels: is_causal goes without attn_mask and up to {_MOST_CAUSAL} queries times keys, "
                f"got {rows} and {keys} {'with' if mask is not None else 'without'} attn_mask"
            )
        return torch.ones(1, 1, rows, keys, dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return None
    if mask.shape == (q.shape[0], keys):  # which keys a sample has
        mask = mask[:, None, None]
    mask = mask[(None,) * (4 - mask.ndim)]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    mask = mask if mask.dtype in (torch.bool, q.dtype, wide) else mask.to(wide)
    return mask.expand(*mask.shape[:-1], keys)


def _attentions(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Modules with an attention processor, and it."""
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if processor is not None and hasattr(module, "set_processor"):
            yield module, processor


def _ours(processor: Any) -> bool:
    return isinstance(processor, Processor)


def _dispatches(processor: Any) -> bool:
    return hasattr(processor, "_attention_backend")


def _replacements() -> dict[type, Callable[[Any, str], "Processor"]]:
    own = _import("diffusers.models.attention_processor")
    hidream = _import("diffusers.models.transformers.transformer_hidream_image")
    lumina = _import("diffusers.models.transformers.transformer_lumina2")
    return {
        own.AttnProcessor2_0: PlainProcessor,
        own.JointAttnProcessor2_0: JointProcessor,
        own.FusedJointAttnProcessor2_0: FusedJointProcessor,
        own.AuraFlowAttnProcessor2_0: AuraFlowProcessor,
        own.FusedAuraFlowAttnProcessor2_0: FusedAuraFlowProcessor,
        lumina.Lumina2AttnProcessor2_0: partial(Lumina2Processor, lumina.apply_rotary_emb),
        hidream.HiDreamAttnProcessor: partial(HiDreamProcessor, hidream.apply_rope),
    }


class Processor:
    """A processor: the projections of a diffusers attention module, and the op between them."""

    def __init__(self, replaced: Any, precision: str):
        self.replaced, self.precision = replaced, precision

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """`[batch, tokens, heads, d]` to `[batch, tokens, heads d]`."""
        y = attention(q, k, v, bias=bias, scale=scale, layout="blhd", precision=self.precision)
        return y.flatten(2)


class PlainProcessor(Processor):
    """`AttnProcessor2_0`: one stream, or tokens that attend to others."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **_):
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        image = x.shape if x.ndim == 4 else None
        if image:
            x = x.flatten(2).transpose(1, 2)
        others = x if encoder_hidden_states is None else encoder_hidden_states
        bias = None
        if attention_mask is not None:
            bias = attn.prepare_attention_mask(attention_mask, others.shape[1], len(others))
            bias = bias.view(len(others), attn.heads, -1, bias.shape[-1])
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            others = x
        elif attn.norm_cross:
            others = attn.norm_encoder_hidden_states(others)
        q = _heads(attn, attn.to_q(x), attn.norm_q)
        k = _heads(attn, attn.to_k(others), attn.norm_k)
        v = _heads(attn, attn.to_v(others))
        x = _out(attn, self.attend(q, k, v, bias))
        if image:
            x = x.transpose(1, 2).reshape(image)
        return (x + hidden_states if attn.residual_connection else x) / attn.rescale_output_factor


class JointProcessor(Processor):
    """`JointAttnProcessor2_0` of SD3 and 3.5: image, then text; or the image alone. Masks are not read, as
    there."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        image = _own_heads(attn, hidden_states)
        if encoder_hidden_states is None:
            return _out(attn, self.attend(*image))
        qkv = _joined(image, _added_heads(attn, encoder_hidden_states))
        return self.results(attn, self.attend(*qkv), hidden_states.shape[1])

    def results(self, attn, y: Tensor, image: int) -> tuple[Tensor, Tensor]:
        text = y[:, image:] if attn.context_pre_only else attn.to_add_out(y[:, image:])
        return _out(attn, y[:, :image]), text


class FusedJointProcessor(JointProcessor):
    """`FusedJointAttnProcessor2_0`, after `fuse_qkv_projections`: queries, keys and values are slices of one
    projection, without norms, as there."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        qkv = torch.cat([attn.to_qkv(hidden_states), attn.to_added_qkv(encoder_hidden_states)], 1)
        y = self.attend(*(_heads(attn, t) for t in qkv.chunk(3, -1)))
        return self.results(attn, y, hidden_states.shape[1])


class AuraFlowProcessor(Processor):
    """`AuraFlowAttnProcessor2_0`: text, then image, or both in one stream."""

    fused = False

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        qkv = _own_heads(attn, hidden_states, self.fused)
        if encoder_hidden_states is None:
            return _out(attn, self.attend(*qkv, scale=attn.scale))
        qkv = _joined(_added_heads(attn, encoder_hidden_states, self.fused), qkv)
        y, text = self.attend(*qkv, scale=attn.scale), encoder_hidden_states.shape[1]
        return _out(attn, y[:, text:]), attn.to_add_out(y[:, :text])


class FusedAuraFlowProcessor(AuraFlowProcessor):
    """`FusedAuraFlowAttnProcessor2_0`, after `fuse_qkv_projections`."""

    fused = True


class RotatingProcessor(Processor):
    """One that turns queries and keys by a function of the model's own module."""

    def __init__(self, rotate: Callable[..., Any], replaced: Any, precision: str):
        super().__init__(replaced, precision)
        self.rotate = rotate


class Lumina2Processor(RotatingProcessor):
    """`Lumina2AttnProcessor2_0`: fewer heads of keys, and a scale that grows with the number of tokens."""

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states,
        attention_mask=None,
        image_rotary_emb=None,
        base_sequence_length=None,
    ):
        q = _heads(attn, attn.to_q(hidden_states))
        dtype, d = q.dtype, q.shape[-1]
        k, v = (p(encoder_hidden_states).unflatten(-1, (-1, d)) for p in (attn.to_k, attn.to_v))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (self.rotate(t, image_rotary_emb, use_real=False) for t in (q, k))
        scale = attn.scale
        if base_sequence_length is not None:
            scale *= math.log(hidden_states.shape[1], base_sequence_length) ** 0.5
        bias = None if attention_mask is None else attention_mask.bool().view(len(q), 1, 1, -1)
        return _out(attn, self.attend(q.to(dtype), k.to(dtype), v, bias, scale))


class HiDreamProcessor(RotatingProcessor):
    """`HiDreamAttnProcessor`: norms over the full width, image, then text, or both in one stream."""

    def __call__(
        self,
        attn,
        hidden_states,
        hidden_states_masks=None,
        encoder_hidden_states=None,
        image_rotary_emb=None,
        **_,
    ):
        dtype = hidden_states.dtype
        q = _heads(attn, attn.q_rms_norm(attn.to_q(hidden_states)).to(dtype))
        k = _heads(attn, attn.k_rms_norm(attn.to_k(hidden_states)).to(dtype))
        v = _heads(attn, attn.to_v(hidden_states))
        if hidden_states_masks is not None:
            k = k * hidden_states_masks.view(len(k), -1, 1, 1)
        if not attn.single:
            text = encoder_hidden_states
            text_q = _heads(attn, attn.q_rms_norm_t(attn.to_q_t(text)).to(dtype))
            text_k = _heads(attn, attn.k_rms_norm_t(attn.to_k_t(text)).to(dtype))
            q, k, v = _joined((q, k, v), (text_q, text_k, _heads(attn, attn.to_v_t(text))))
        turning = 2 * image_rotary_emb.shape[-3]  # numbers of a head that are rotated
        if turning == q.shape[-1]:
            q, k = self.rotate(q, k, image_rotary_emb)
        else:
            (q_turned, q_rest), (k_turned, k_rest) = q.chunk(2, -1), k.chunk(2, -1)
            q_turned, k_turned = self.rotate(q_turned, k_turned, image_rotary_emb)
            q, k = torch.cat([q_turned, q_rest], -1), torch.cat([k_turned, k_rest], -1)
        y = self.attend(q, k, v)
        if attn.single:
            return attn.to_out(y)
        image = hidden_states.shape[1]
        return attn.to_out(y[:, :image]), attn.to_out_t(y[:, image:])


def _heads(attn, x: Tensor, norm: nn.Module | None = None) -> Tensor:
    """`[batch, tokens, heads, d]`, with the norm of each head where there is one."""
    x = x.unflatten(-1, (attn.heads, -1))
    return x if norm is None else norm(x)


def _own_heads(attn, x: Tensor, fused: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the first stream of a module."""
    q, k, v = attn.to_qkv(x).chunk(3, -1) if fused else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
    return _heads(attn, q, attn.norm_q), _heads(attn, k, attn.norm_k), _heads(attn, v)


def _added_heads(attn, x: Tensor, fused: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Those of its second stream."""
    if fused:
        q, k, v = attn.to_added_qkv(x).chunk(3, -1)
    else:
        q, k, v = attn.add_q_proj(x), attn.add_k_proj(x), attn.add_v_proj(x)
    return _heads(attn, q, attn.norm_added_q), _heads(attn, k, attn.norm_added_k), _heads(attn, v)


def _joined(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(pair, 1) for pair in zip(first, second, strict=True))


def _out(attn, y: Tensor) -> Tensor:
    """The output projection, and dropout."""
    return attn.to_out[1](attn.to_out[0](y))
