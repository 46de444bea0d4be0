"""The table of methods in docs/samplers.md is what the methods do."""

import importlib
import math
from pathlib import Path

import pytest
import torch

from rfkernels.ops import noise_keys
from rfkernels.samplers import METHODS, init, nfe, plan_for, sample, schedule
from tests.samplers.golden import velocity

plans = importlib.import_module("rfkernels.samplers.plan")
adaptive = importlib.import_module("rfkernels.samplers.adaptive")
DOCS = Path(__file__).parents[2] / "docs" / "samplers.md"


def table() -> dict[str, list[str]]:
    """The cells of each method's line after its name and what it is: calls, order, passes, launches."""
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0].strip("| `"): row[2:] for row in cells if len(row) == 6}


@pytest.fixture(scope="module")
def exact():
    x = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None]
    return x, sample(velocity, x, schedule("linear", 512), method="rk4")


def traffic(method: str, guidance: float | None) -> tuple[int, int]:
    """Passes and launches of the sixth of eight steps."""
    x = torch.zeros(1, 1)
    state = init(plan_for(method, schedule("linear", 8)), x, guide=guidance, keys=noise_keys(0, 1))
    launches = [
        launch
        for stage, lowered in zip(state.plan.stages, state.runtime.stages, strict=True)
        if stage.step == 5
        for launch in lowered.launches
    ]
    return sum(len(launch.inputs) + len(launch.outputs) for launch in launches), len(launches)


def test_every_method_has_a_line():
    assert list(table()) == list(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_line_of_a_method(method, exact, monkeypatch):
    calls, order, passes, launches = table()[method]
    entry = METHODS[method]
    if entry.adaptive:
        seen, launched = [], []
        monkeypatch.setattr(
            plans, "combine", lambda *a, f=plans.combine, **k: launched.append(a) or f(*a, **k)
        )
        monkeypatch.setattr(adaptive, "combine", plans.combine)
        v = lambda x, sigma: seen.append(sigma) or velocity(x, sigma)
        sample(v, exact[0], schedule("linear", 1), method=method)
        attempts = (len(launched) - 2) / int(launches)  # two launches before the first
        assert calls == f"{(len(seen) - 2) / attempts:.0f} an attempt" and attempts > 3
        assert (order, passes) == (f"{entry.order}", "-")
        return
    extra = nfe(method, 100) - 100 * entry.evaluations
    assert calls == f"{entry.evaluations}" + (f" (+{extra})" if extra else "")
    plain, guided = traffic(method, None), traffic(method, 2.0)
    assert passes == f"{plain[0]}, {guided[0]}" and launches == f"{plain[1]}"
    assert plain[1] == guided[1] == entry.evaluations
    if entry.stochastic or method == "rfpp":
        assert order == "-"
        return
    x, end = exact
    errors = [
        (sample(velocity, x, schedule("linear", n), method=method) - end).abs().max().item()
        for n in (64, 128)
    ]
    assert float(order) == pytest.approx(math.log2(errors[0] / errors[1]), abs=0.06)
