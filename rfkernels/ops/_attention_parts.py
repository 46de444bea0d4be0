"""What the definition of `attention` and its gradient have in common."""

import torch
from torch import Tensor

BLOCK_ROWS, BLOCK_KEYS = 128, 64  # of a block mask


def shifted(k: Tensor, v: Tensor, head_shift: Tensor | None, frames: int) -> tuple[Tensor, Tensor]:
    """Keys and values where kv head h of sample b is that of sample `source_samples(...)[b, h]`."""
    if head_shift is None:
        return k, v
    source = source_samples(k.shape[0], head_shift, frames)
    head = torch.arange(k.shape[1], device=k.device)
    return k[source, head], v[source, head]


def source_samples(samples: int, head_shift: Tensor, frames: int) -> Tensor:
    """[samples, kv heads]: b + head_shift[h], or b itself where that is another clip's frame."""
    b = torch.arange(samples, device=head_shift.device)[:, None]
    frame = b % frames + head_shift
    return torch.where((frame >= 0) & (frame < frames), b + head_shift, b)


def hidden_keys(
    q, keys: int, key_lengths, q_starts, k_starts, block_mask, head_shift, frames
) -> Tensor | None:
    """True where a query does not see a key, broadcastable to [batch, heads, rows, keys]."""
    batch, heads, rows, _ = q.shape
    hidden = None
    j = torch.arange(keys, device=q.device)
    if key_lengths is not None:
        lengths = key_lengths[:, None]
        if head_shift is not None:
            source = source_samples(batch, head_shift, frames)
            lengths = key_lengths[source].repeat_interleave(heads // len(head_shift), 1)
        hidden = j >= lengths[..., None, None]
    if q_starts is not None:
        i = torch.arange(rows, device=q.device)
        sequence = lambda at, starts: torch.searchsorted(starts[1:].contiguous(), at, right=True)
        hidden = sequence(i, q_starts)[:, None] != sequence(j, k_starts)
    if block_mask is not None:
        seen = block_mask.bool().repeat_interleave(BLOCK_ROWS, -2)[..., :rows, :]
        blocked = ~seen.repeat_interleave(BLOCK_KEYS, -1)[..., :keys]
        hidden = blocked if hidden is None else hidden | blocked
    return hidden


def toeplitz(table: Tensor, rows: int, keys: int, at: slice | None = None) -> Tensor:
    """[heads, rows, keys] of a table [heads, rows + keys - 1], or the rows `at`: entry j - i + rows - 1 at
    (i, j)."""
    i = torch.arange(*(at or slice(0, rows)).indices(rows), device=table.device)[:, None]
    return table[:, torch.arange(keys, device=table.device) - i + rows - 1]
