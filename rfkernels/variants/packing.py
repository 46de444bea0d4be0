"""Ragged batches without padding: prompts of several lengths, pictures of several sizes.

The packing of ByteTransformer (Zhai et al., 2023), with what a rectified flow needs beside it.

Samples lie one behind the other, `[rows, ...]`. Layers that treat rows alike run on them as they are; what
knows about samples takes a `Packing`:

    ops.attention(q, k, v, cu_seqlens=packing.cu_seqlens)            # or (that of q, that of k)
    ops.norm_modulate(x, scale, shift, index=packing.sample)         # tables [batch, width]
    ops.rotary_table(ids, axes_dims), rows packed like x             # text: packing.position

The result of a sample is the one that it has alone. A model that was trained to see its padding (FLUX, SD3)
is another model without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

__all__ = ["JointPacking", "Packing", "join_packings", "packing_of"]


@dataclass(frozen=True)
class Packing:
    """Where the samples of a batch lie.

    Attributes:
        lengths: rows of each sample, numbers on the host.
        cu_seqlens: their starts and the end, int32 `[batch + 1]`.
        sample: which sample a row belongs to, int64 `[rows]`.
        position: which row of its sample it is, int64 `[rows]`.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    sample: Tensor
    position: Tensor

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Samples `[lengths[i], ...]` one behind the other."""
        if tuple(len(part) for part in parts) != self.lengths:
            raise ValueError(
                f"Packing: samples of {list(self.lengths)} rows required, got {[len(p) for p in parts]}"
            )
        return torch.cat(list(parts))

    def unpack(self, x: Tensor) -> tuple[Tensor, ...]:
        """The samples of `[rows, ...]`, as views."""
        self._check(x)
        return x.split(self.lengths)

    def pack_padded(self, x: Tensor) -> Tensor:
        """The rows of `[batch, longest or more, ...]` that are no padding."""
        longest = max(self.lengths, default=0)
        if x.ndim < 2 or len(x) != len(self.lengths) or x.shape[1] < longest:
            raise ValueError(
                f"Packing: [{len(self.lengths)}, {longest} or more, ...] required, got {list(x.shape)}"
            )
        return x.flatten(0, 1).index_select(0, self.sample * x.shape[1] + self.position)

    def pad(self, x: Tensor, length: int | None = None) -> Tensor:
        """`[batch, length, ...]` of `[rows, ...]`, zeros behind every sample; `length`: the longest."""
        self._check(x)
        longest = max(self.lengths, default=0)
        length = longest if length is None else length
        if length < longest:
            raise ValueError(f"Packing: length must be {longest} or more, got {length}")
        out = x.new_zeros(len(self.lengths) * length, *x.shape[1:])
        out = out.index_copy(0, self.sample * length + self.position, x)
        return out.view(len(self.lengths), length, *x.shape[1:])

    def _check(self, x: Tensor) -> None:
        if x.ndim < 1 or len(x) != len(self.sample):
            raise ValueError(f"Packing: [{len(self.sample)}, ...] required, got {list(x.shape)}")


@dataclass(frozen=True)
class JointPacking:
    """Several streams of one batch as one: of every sample the first stream's rows, then the second's, ...

    Attributes:
        packing: of the joint rows.
        streams: the packings of the streams.
        order: row i of the joint rows is row order[i] of the streams one behind the other; int64.
        back: the inverse of `order`.
    """

    packing: Packing
    streams: tuple[Packing, ...]
    order: Tensor
    back: Tensor

    def join(self, *streams: Tensor) -> Tensor:
        """The joint rows of `[rows, ...]` of every stream."""
        for packing, x in zip(self.streams, streams, strict=True):
            packing._check(x)
        return torch.cat(streams).index_select(0, self.order)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The streams of joint rows."""
        self.packing._check(x)
        return x.index_select(0, self.back).split([len(p.sample) for p in self.streams])


def packing_of(lengths: Sequence[int], device: torch.device | str | None = None) -> Packing:
    """The packing of samples of these lengths, 0 allowed; nothing waits for the device.

    Raises:
        ValueError: a length below 0.
    """
    lengths = tuple(int(n) for n in lengths)
    if any(n < 0 for n in lengths):
        raise ValueError(f"packing_of: lengths must be 0 or more, got {list(lengths)}")
    starts = torch.tensor([0, *accumulate(lengths)])
    sample = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    position = torch.arange(len(sample)) - starts[sample]
    return Packing(lengths, *(t.to(device) for t in (starts.int(), sample, position)))


def join_packings(*streams: Packing) -> JointPacking:
    """The joint packing of the streams of one batch, text and picture as a rule.

    Raises:
        ValueError: streams of several batches, or none.
    """
    if not streams or len({len(p.lengths) for p in streams}) > 1:
        raise ValueError(
            f"join_packings: streams of one batch required, got {[len(p.lengths) for p in streams]}"
        )
    samples = torch.cat([p.sample for p in streams])
    order = samples.argsort(stable=True)
    lengths = [sum(n) for n in zip(*(p.lengths for p in streams), strict=True)]
    joint = packing_of(lengths, samples.device)
    return JointPacking(joint, streams, order, order.argsort())
