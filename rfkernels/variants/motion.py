"""Motion of other videos as a condition: the motion adapter of MotionRAG (Zhu et al., 2025).

Inside an attention, between softmax(q k^T) v =: o and the layer that leaves it,

    o + s attention(Wq o, Wk m, Wv m)

with motion tokens m. Keys and values of m do not depend on the time: they are made once per condition. The
hook stands before `to_out[0]`, so that the attention itself may be computed by any processor.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rfkernels.nn import run_linear
from rfkernels.ops import attention
from rfkernels.variants._place import beside_layer

__all__ = ["MotionAdapter", "MotionLayer"]


class MotionLayer(nn.Module):
    """The adapter of one attention: `to_q_ip`, `to_k_ip`, `to_v_ip`, without bias.

    `to_v_ip` is zero at initialisation: o comes back to the bit.
    """

    def __init__(self, width: int, heads: int, motion_width: int, **place):
        super().__init__()
        self.heads = heads
        self.to_q_ip = nn.Linear(width, width, bias=False, **place)
        self.to_k_ip = nn.Linear(motion_width, width, bias=False, **place)
        self.to_v_ip = nn.Linear(motion_width, width, bias=False, **place)
        nn.init.zeros_(self.to_v_ip.weight)

    def keys(self, motion: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of motion tokens `[batch, tokens, motion_width]`."""
        motion = motion.to(self.to_k_ip.weight)
        k, v = (run_linear(layer, motion) for layer in (self.to_k_ip, self.to_v_ip))
        return k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def forward(self, o: Tensor, keys: tuple[Tensor, Tensor], scale: float | Tensor = 1.0) -> Tensor:
        """o `[batch, tokens, width]` with the motion in it; the batch is that of the keys, or a multiple:
        neighbours share a condition (the frames of a sample in image models)."""
        if len(o) % len(keys[0]):
            raise ValueError(f"MotionLayer: {len(keys[0])} conditions must divide the batch, got {len(o)}")
        k, v = (t if len(t) == len(o) else t.repeat_interleave(len(o) // len(t), 0) for t in keys)
        q = run_linear(self.to_q_ip, o).unflatten(-1, (self.heads, -1))
        moved = attention(q, k, v, layout="blhd").flatten(2)
        if isinstance(scale, Tensor):
            return torch.addcmul(o, moved, scale.to(o))
        return torch.add(o, moved, alpha=scale)


class MotionAdapter(nn.Module):
    """Motion layers for the attentions of a model; `layers.i` belongs to the i-th of them.

    >>> adapter = MotionAdapter(b.attn1 for b in model.transformer_blocks)
    >>> adapter.attach()
    >>> adapter.condition(motion)  # once per condition, while training once per step
    >>> adapter.scale = 0.5

    Args:
        attentions: attention modules of diffusers (CogVideoX, Wan, SD, ...): `heads`, and `to_out[0]`, which
            takes all tokens. Attach after adapters are loaded: one that replaces `to_out[0]` takes the place
            of the hook too.
        motion_width: of a motion token, by default the width of each attention.
        dtype: of the layers, by default that of `to_out[0]`; required where its weight is codes.

    Attributes:
        scale: s, a number, or a tensor on the device that may change between runs of a CUDA graph; the number
            0 leaves the adapter out.
    """

    def __init__(
        self,
        attentions: Iterable[nn.Module],
        motion_width: int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self._attentions = list(attentions)  # no modules of this one
        known = lambda a: hasattr(a, "heads") and isinstance(getattr(a, "to_out", None), nn.ModuleList)
        if not self._attentions or not all(map(known, self._attentions)):
            got = ", ".join(sorted({type(a).__name__ for a in self._attentions})) or "none"
            raise ValueError(f"MotionAdapter: attention modules with heads and to_out required, got {got}")
        self.layers = nn.ModuleList()
        for attention_module in self._attentions:
            out = attention_module.to_out[0]
            width, place = out.in_features, beside_layer("MotionAdapter", out, dtype)
            layer = MotionLayer(width, attention_module.heads, motion_width or width, **place)
            self.layers.append(layer)
        self.scale: float | Tensor = 1.0
        self._keys: list[tuple[Tensor, Tensor]] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def condition(self, motion: Tensor | None) -> None:
        """Makes keys and values of motion tokens `[batch, tokens, motion_width]` for every layer; None: no
        condition."""
        if motion is not None and motion.ndim != 3:
            raise ValueError(
                f"MotionAdapter: motion must be [batch, tokens, motion_width], got {list(motion.shape)}"
            )
        self._keys = None if motion is None else [layer.keys(motion) for layer in self.layers]

    def attach(self) -> None:
        """Starts to act on the attentions; a second call changes nothing."""
        if self._handles:
            return
        for i, module in enumerate(self._attentions):
            hook = lambda _, args, i=i: (self._moved(i, args[0]), *args[1:])
            self._handles.append(module.to_out[0].register_forward_pre_hook(hook))

    def detach(self) -> None:
        """Leaves the attentions as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _moved(self, i: int, o: Tensor) -> Tensor:
        off = self._keys is None or (not isinstance(self.scale, Tensor) and self.scale == 0)
        return o if off else self.layers[i](o, self._keys[i], self.scale)
