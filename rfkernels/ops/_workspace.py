"""Memory that a kernel needs for the length of a call."""

import threading

import torch
from torch import Tensor

_kept = threading.local()  # each thread's last workspace: new pages would cost a small call a tenth
_MOST_KEPT = 64 << 20


def workspace_of(size: int, device: torch.device) -> Tensor | None:
    """`size` bytes, aligned to 16: on the CPU the thread's own, on CUDA from torch's allocator."""
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device) if size else None
    workspace = getattr(_kept, "workspace", None)
    if workspace is None or workspace.numel() < size:
        workspace = torch.empty(size, dtype=torch.uint8)
        if size <= _MOST_KEPT:
            _kept.workspace = workspace
    return workspace
