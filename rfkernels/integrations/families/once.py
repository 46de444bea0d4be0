"""What a forward makes of tensors that a model hands to all of its blocks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["once"]

_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def once(make: Callable[..., Any], first: Tensor, *others: Tensor, **options: Any) -> Any:
    """`make` of the tensors; kept while the first one lives, made again where one is new or changed.

    A graph that is recorded makes it itself: replayed, it reads what the tensors are by then.
    """
    capturing = first.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing or torch.compiler.is_compiling():
        return make(first, *others, **options)
    state = (make, options, [t._version for t in (first, *others)], [id(t) for t in others])
    kept = _made.get(first)
    if kept is None or kept[0] != state:
        kept = _made[first] = (state, others, make(first, *others, **options))
    return kept[2]
