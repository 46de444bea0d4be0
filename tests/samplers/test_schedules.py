import math

import pytest
import torch

from rfkernels.samplers import schedule
from rfkernels.samplers.schedules import dynamic_mu

# FLUX.1-dev (specs of the model): steps, tokens, noise levels.
FLUX = [
    (4, 4096, [1, 0.904531, 0.759511, 0.512844, 0]),
    (8, 1024, [1, 0.929295, 0.849235, 0.757831, 0.652489, 0.529758, 0.384945, 0.2115, 0]),
]


def test_linear_is_uniform():
    assert schedule("linear", 4).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_static_shift_is_applied_once():
    # diffusers' default grid would give 1, .85769, .60215, .00893, 0: its last call is wasted.
    assert schedule("shift", 4, shift=3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-15)


def test_shifts_compose():
    once = schedule("shift", 10, shift=6.0)
    first = schedule("shift", 10, shift=2.0)
    torch.testing.assert_close(3 * first / (1 + 2 * first), once)
    inside = slice(1, -1)
    logit = torch.logit(schedule("linear", 10)[inside]) + math.log(6)
    torch.testing.assert_close(torch.logit(once[inside]), logit)


@pytest.mark.parametrize("steps, tokens, levels", FLUX)
def test_dynamic_shift_is_that_of_flux(steps, tokens, levels):
    assert schedule("dynamic", steps, tokens=tokens).tolist() == pytest.approx(levels, abs=6e-7)


@pytest.mark.parametrize("tokens, mu", [(256, 0.5), (1024, 0.63), (4096, 1.15), (6144, 1.496666667)])
def test_dynamic_mu_is_that_of_flux(tokens, mu):
    assert dynamic_mu(tokens) == pytest.approx(mu, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    "name, parameters",
    [("linear", {}), ("shift", {"shift": 0.2}), ("shift", {"shift": 12.0}), ("dynamic", {"tokens": 4096})],
)
def test_every_schedule_falls_from_one_to_zero(name, parameters, steps):
    sigmas = schedule(name, steps, **parameters)
    assert sigmas.dtype == torch.float64 and len(sigmas) == steps + 1
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: schedule("karras", 4), "schedule must be one of linear, shift, dynamic, got 'karras'"),
        (lambda: schedule("linear", 0), "steps must be a whole number of at least 1, got 0"),
        (lambda: schedule("linear", 2.5), "steps must be a whole number of at least 1, got 2.5"),
        (lambda: schedule("shift", 4), "'shift' needs shift=, got none"),
        (lambda: schedule("shift", 4, shift=0.0), "shift must be a positive number, got 0.0"),
        (lambda: schedule("shift", 4, shift=math.nan), "shift must be a positive number, got nan"),
        (lambda: schedule("linear", 4, shift=3.0), "'linear' takes no shift, got 3.0"),
        (lambda: schedule("shift", 4, shift=3.0, tokens=16), "'shift' takes no tokens, got 16"),
        (lambda: schedule("dynamic", 4, tokens=0), "tokens must be a whole number of at least 1, got 0"),
    ],
)
def test_schedule_refuses(call, message):
    with pytest.raises(ValueError, match=message.replace("'", ".")):
        call()
