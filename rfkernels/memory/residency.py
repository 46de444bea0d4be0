"""Which layers stay on the device and which come and go: used by the ring, and by the plan before it."""

from collections.abc import Sequence

__all__ = ["device_bytes", "streamed_layers"]


def streamed_layers(
    sizes: Sequence[int], *, ahead: int = 1, slots: int | None = None, budget: int | None = None
) -> tuple[int, ...] | None:
    """The layers that cannot stay, as few as possible and evenly spread, so that each copy has the time of
    several layers; they share `ahead + 1` slots of the largest of them.

    Args:
        sizes: bytes of the layers in the order of their use.
        ahead: layers that are copied while another runs.
        slots: layers on the device at once; or
        budget: bytes on the device.

    Returns:
        Their numbers, none where all fit; None where not even the slots fit.
    """
    count = len(sizes)
    if slots is not None:
        if slots >= count:
            return ()
        return _spread(count, count - slots + ahead + 1) if slots > ahead else None
    for moving in (0, *range(ahead + 2, count + 1)):
        streamed = _spread(count, moving)
        if device_bytes(sizes, streamed, ahead) <= budget:
            return streamed
    return None


def device_bytes(sizes: Sequence[int], streamed: Sequence[int], ahead: int = 1) -> int:
    """Of the layers that stay and of the slots for those that do not."""
    largest = max((sizes[i] for i in streamed), default=0)
    return sum(sizes) - sum(sizes[i] for i in streamed) + min(len(streamed), ahead + 1) * largest


def _spread(count: int, chosen: int) -> tuple[int, ...]:
    return tuple(i for i in range(count) if (i + 1) * chosen // count > i * chosen // count)
