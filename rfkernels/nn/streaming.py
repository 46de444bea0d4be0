"""Attention over a window that moves along a stream of tokens."""

import torch
from torch import Tensor, nn

from rfkernels.ops.attention import attention

__all__ = ["ContinualAttention", "KeyValueWindow"]

_OF_POSITIONS = ("bias", "factor", "key_lengths", "cu_seqlens", "block_mask", "head_shift", "frames")


class KeyValueWindow(nn.Module):
    """The keys and values of the last `window` tokens of a stream, in a ring buffer of fixed size.

    `attend` is exact over what is in the window: softmax does not depend on the order of the keys, so the
    place of a token in the ring does not matter. No method waits for the device. The buffers, `[batch,
    kv_heads, window, d]`, take shape, dtype and device of the first tokens and are no part of a state dict.
    """

    def __init__(self, window: int):
        super().__init__()
        if window < 1:
            raise ValueError(f"KeyValueWindow: window must be at least 1, got {window}")
        self.window = window
        self.seen = 0  # tokens written since the last reset
        self.register_buffer("keys", None, persistent=False)
        self.register_buffer("values", None, persistent=False)

    def __len__(self) -> int:
        return min(self.seen, self.window)

    def reset(self) -> None:
        """Forgets all tokens."""
        self.seen = 0
        self.keys = self.values = None

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor) -> None:
        """Takes tokens `[batch, kv_heads, tokens, d]`, one or more; the oldest leave. Without a gradient.

        Raises:
            ValueError: k and v of different shape or dtype, or unlike those before.
        """
        if k.ndim != 4 or k.shape != v.shape or k.dtype != v.dtype:
            raise ValueError(
                "KeyValueWindow: k and v must be [batch, kv_heads, tokens, d] of one dtype, got "
                f"{tuple(k.shape)} {k.dtype} and {tuple(v.shape)} {v.dtype}"
            )
        if self.keys is None:
            self._allocate(k)
        batch, kv_heads, _, d = self.keys.shape
        if (k.shape[0], k.shape[1], k.shape[3]) != (batch, kv_heads, d) or k.dtype != self.keys.dtype:
            raise ValueError(
                f"KeyValueWindow: tokens must be [{batch}, {kv_heads}, tokens, {d}] {self.keys.dtype} as "
                f"those before, got {tuple(k.shape)} {k.dtype}"
            )
        skipped = max(0, k.shape[2] - self.window)  # of more tokens than the window holds the last stay
        k, v = k[:, :, skipped:], v[:, :, skipped:]
        at = self.seen % self.window
        first = min(k.shape[2], self.window - at)
        for ring, new in ((self.keys, k), (self.values, v)):
            ring[:, :, at : at + first] = new[:, :, :first]
            ring[:, :, : new.shape[2] - first] = new[:, :, first:]
        self.seen += k.shape[2]

    def attend(self, q: Tensor, **options) -> Tensor | tuple[Tensor, Tensor]:
        """`rfkernels.ops.attention` of queries `[batch, heads, rows, d]` to the window.

        Args:
            options: those of `attention` that do not speak of the positions of keys: scale, key_mean,
                layout (of q and the result), precision, return_lse.

        Raises:
            ValueError: an option that does; no token yet.
        """
        refused = [name for name in _OF_POSITIONS if name in options]
        if refused:
            raise ValueError(f"KeyValueWindow: keys lie in no order, got {', '.join(refused)}")
        if self.keys is None:
            raise ValueError("KeyValueWindow: expected tokens (append) before queries, got none")
        keys, values = self.keys, self.values
        if options.get("layout") == "blhd":
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        lengths = None
        if self.seen < self.window:
            lengths = torch.full((q.shape[0],), self.seen, dtype=torch.int32, device=q.device)
        return attention(q, keys, values, key_lengths=lengths, **options)

    def _allocate(self, k: Tensor) -> None:
        with torch.inference_mode(False):  # else the buffers could not be written outside of it
            shape = (k.shape[0], k.shape[1], self.window, k.shape[3])
            self.keys, self.values = (torch.zeros(shape, dtype=k.dtype, device=k.device) for _ in range(2))


class ContinualAttention(nn.Module):
    r"""The attention of all queries of a moving window, in time O(window d) for a new token.

    A row keeps its sum :math:`s_i = \sum_j e^{q_i k_j - r_i}` and :math:`y_i = \sum_j e^{q_i k_j - r_i} v_j`.
    The column of the oldest key is subtracted from both, that of the newest added, and the row of the newest
    query made in full. The reference :math:`r_i` is the logarithm of the sum of the row where it was made,
    and rises with a score above it, so that nothing overflows. All of it is float64, and is made anew after
    `window` steps, or where a row has lost digits: where its sum has fallen below 2^-16 of what it was. To
    see that, a step waits for the device.

    Source: Continual Transformers, Hedegaard et al., 2022 (retroactive attention). Its single-output form is
    `KeyValueWindow.attend` of the newest query.
    """

    def __init__(self, window: int, *, scale: float | None = None):
        super().__init__()
        self.scale = scale
        self.tokens = KeyValueWindow(window)
        self.steps = 0  # since the sums were made in full
        for name in ("queries", "reference", "sums", "largest", "weighted"):
            self.register_buffer(name, None, persistent=False)

    def reset(self) -> None:
        """Forgets all tokens."""
        self.tokens.reset()
        self.queries = None

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One step, without a gradient.

        Args:
            q: the newest query `[batch, heads, 1, d]`.
            k, v: its key and value `[batch, kv_heads, 1, d]`; kv_heads divides heads.

        Returns:
            `[batch, heads, n, d]` like q: the result of every query of the window, the newest last.

        Raises:
            ValueError: other shapes, or shapes unlike those of the step before.
        """
        self._check(q, k, v)
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        wide, k, v = q.double(), k.double(), v.double()
        if self.queries is None:
            self._allocate(wide)
        window, slot = self.tokens.window, self.tokens.seen % self.tokens.window
        heads = lambda t: t.repeat_interleave(q.shape[1] // k.shape[1], 1)
        rows = slice(0, len(self.tokens))
        if rows.stop == window:
            oldest = [t[:, :, slot : slot + 1] for t in (self.tokens.keys, self.tokens.values)]
            self._add(rows, *map(heads, oldest), scale, -1)
        self.tokens.append(k, v)
        self._add(rows, heads(k), heads(v), scale, 1)
        self.queries[:, :, slot] = wide[:, :, 0]
        self._make(slice(slot, slot + 1), scale)
        self.steps += 1
        rows = slice(0, len(self.tokens))
        kept = self.sums[:, :, rows] >= self.largest[:, :, rows] * 2.0**-16  # False of NaN too
        kept &= ~self.weighted[:, :, rows].isnan().any(-1)
        if self.steps >= window or not bool(kept.all()):
            self._make(rows, scale)
            self.steps = 0
        result = self.weighted[:, :, rows] / self.sums[:, :, rows, None]
        return result.roll(-(slot + 1), 2).to(q.dtype)  # the oldest lies behind the newest

    def _add(self, rows: slice, k: Tensor, v: Tensor, scale: float, sign: int) -> None:
        """Adds the column of a key `[batch, heads, 1, d]` to the rows, or subtracts it."""
        scores = scale * (self.queries[:, :, rows] * k).sum(-1)
        reference = torch.maximum(self.reference[:, :, rows], scores)  # 1 below where it has not risen
        before = (self.reference[:, :, rows] - reference).exp()
        self.reference[:, :, rows] = reference
        weight = sign * (scores - reference).exp()
        self.weighted[:, :, rows] = self.weighted[:, :, rows] * before[..., None] + weight[..., None] * v
        self.sums[:, :, rows] = self.sums[:, :, rows] * before + weight
        self.largest[:, :, rows] = torch.maximum(self.largest[:, :, rows], self.sums[:, :, rows])

    def _make(self, rows: slice, scale: float) -> None:
        """The rows in full."""
        out, lse = self.tokens.attend(self.queries[:, :, rows], scale=scale, return_lse=True)
        self.weighted[:, :, rows], self.reference[:, :, rows] = out, lse
        self.sums[:, :, rows] = self.largest[:, :, rows] = 1

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        if any(t.ndim != 4 for t in (q, k, v)):
            shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
            raise ValueError(f"ContinualAttention: q, k and v must be [batch, heads, 1, d], got {shapes}")
        batch, heads, _, d = (q if self.queries is None else self.queries).shape
        kv_heads = (k if self.queries is None else self.tokens.keys).shape[1]
        if q.shape != (batch, heads, 1, d):
            raise ValueError(
                f"ContinualAttention: q must be [{batch}, {heads}, 1, {d}], one token like those before, got "
                f"{tuple(q.shape)}"
            )
        if any(t.shape != (batch, kv_heads, 1, d) for t in (k, v)) or kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"ContinualAttention: k and v must be [{batch}, kv_heads, 1, {d}] like those before, with "
                f"kv_heads a divisor of {heads}, got {tuple(k.shape)} and {tuple(v.shape)}"
            )

    def _allocate(self, q: Tensor) -> None:
        with torch.inference_mode(False):
            shape = (*q.shape[:2], self.tokens.window)
            options = {"dtype": torch.float64, "device": q.device}
            self.queries, self.weighted = (torch.zeros(*shape, q.shape[-1], **options) for _ in range(2))
            self.reference, self.sums, self.largest = (torch.zeros(shape, **options) for _ in range(3))
