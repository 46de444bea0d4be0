"""Summaries of timed samples."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """Seconds of one call: median, 20th and 80th percentile, minimum, and how many were timed."""

    median: float
    p20: float
    p80: float
    min: float
    samples: int

    @property
    def spread(self) -> float:
        """(p80 - p20) / median: what to disregard in a comparison."""
        return (self.p80 - self.p20) / self.median


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile of the samples, linear between neighbours (numpy's default)."""
    if not samples:
        raise ValueError("quantile: needs at least one sample, got none")
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summarise(samples: Sequence[float]) -> Stats:
    """The `Stats` of the samples, in their unit."""
    return Stats(
        median=quantile(samples, 0.5),
        p20=quantile(samples, 0.2),
        p80=quantile(samples, 0.8),
        min=min(samples),
        samples=len(samples),
    )
