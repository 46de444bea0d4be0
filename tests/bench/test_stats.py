import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.stats import quantile, summarise

SAMPLES = st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=40)


@given(SAMPLES, st.floats(0, 1))
def test_quantile_is_numpys(samples: list[float], q: float) -> None:
    assert quantile(samples, q) == pytest.approx(np.quantile(samples, q), rel=1e-12)


def test_summarise_knows_its_samples() -> None:
    found = summarise([5.0, 1.0, 2.0, 4.0, 3.0, 100.0])
    assert (found.median, found.p20, found.p80, found.min, found.samples) == (3.5, 2.0, 5.0, 1.0, 6)
    assert found.spread == pytest.approx(3 / 3.5)


@given(SAMPLES)
def test_summary_is_ordered(samples: list[float]) -> None:
    found = summarise(samples)
    assert found.min <= found.p20 <= found.median <= found.p80 <= max(samples)


def test_no_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample, got none"):
        quantile([], 0.5)
