"""The levels of published models: their tables, and the schedulers of diffusers that their pipelines use."""

import math

import diffusers
import numpy as np
import pytest
import torch

from rfkernels.samplers import schedule
from rfkernels.samplers.model_schedules import (
    MODEL_SCHEDULES,
    cogview4_mu,
    flux2_mu,
    image_tokens,
    ltx_mu,
    model_schedule,
    qwen_image_mu,
)
from rfkernels.samplers.schedules import invert, timesteps_for

F64 = torch.float64

# Model, steps, tokens, levels, half a unit of their last digit: from the models' code.
TABLES = [
    ("flux.1-dev", 4, 4096, [1, 0.904531, 0.759511, 0.512844, 0], 6e-7),
    ("flux.1-dev", 8, 1024, [1, 0.929295, 0.849235, 0.757831, 0.652489, 0.529758, 0.384945, 0.2115, 0], 6e-7),
    ("flux.1-schnell", 4, 4096, [1, 0.75, 0.5, 0.25, 0], 1e-15),
    ("sd3.5-large-turbo", 4, None, [1, 0.9, 0.75, 0.5, 0], 1e-15),
    ("cogview4", 4, 4096, [1, 0.906977, 0.764706, 0.52, 0], 6e-7),
    ("qwen-image", 8, 4096, [1, 0.916, 0.82, 0.7093, 0.5801, 0.4273, 0.2441, 0.02, 0], 6e-5),
    ("qwen-image-lightning", 4, None, [1, 0.9, 0.75, 0.5, 0], 1e-15),
    ("z-image-turbo", 4, None, [1, 0.9, 0.75, 0.5, 0], 1e-15),
]  # fmt: skip


@pytest.mark.parametrize("model, steps, tokens, levels, digit", TABLES)
def test_levels_are_those_of_the_table(model, steps, tokens, levels, digit):
    assert model_schedule(model, steps, tokens=tokens).tolist() == pytest.approx(levels, abs=digit)


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
@pytest.mark.parametrize("compat", [None, "diffusers"])
@pytest.mark.parametrize("model", MODEL_SCHEDULES)
def test_every_models_levels_fall_to_zero(model, compat, steps):
    sigmas = model_schedule(model, steps, height=768, width=1024, frames=17, compat=compat)
    assert sigmas.dtype == F64 and len(sigmas) == steps + 1
    assert 0.99 < sigmas[0] <= 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    starts_at_one = not MODEL_SCHEDULES[model].grid.startswith("unipc")
    assert (sigmas[0] == 1) == starts_at_one


@pytest.mark.parametrize(
    "tokens, steps, mu", [(4096, 50, 2.02335), (4096, 28, 2.15144), (1024, 50, 1.70196), (4300, 50, 2.0447)]
)
def test_flux2_mu_is_that_of_its_code(tokens, steps, mu):
    digit = 6e-5 if tokens == 4300 else 6e-6
    assert flux2_mu(tokens, steps) == pytest.approx(mu, abs=digit)


def test_flux2_mu_jumps_at_4301_tokens():
    assert flux2_mu(4300, 50) == pytest.approx(2.0447, abs=6e-5)
    assert flux2_mu(4301, 50) == pytest.approx(1.1847, abs=6e-5)
    assert flux2_mu(4301, 10) == flux2_mu(4301, 200)
    assert flux2_mu(4300, 200) == pytest.approx(flux2_mu(4301, 200), abs=2e-4)


def test_other_mus_are_those_of_their_code():
    assert qwen_image_mu(4096) == pytest.approx(0.69355, abs=6e-6)
    assert cogview4_mu(4096) == 3.25
    assert [ltx_mu(1024), ltx_mu(4096)] == pytest.approx([0.95, 2.05], abs=1e-15)


def test_sizes_become_tokens():
    assert image_tokens("flux.1-dev", 1024, 1024) == 4096
    assert image_tokens("flux.1-dev", 1039, 512) == 2048
    assert image_tokens("ltx-video", 512, 704, 161) == 16 * 22 * 21
    assert image_tokens("wan2.1-t2v", 480, 832, 81) == 30 * 52 * 21
    by_size = model_schedule("flux.1-dev", 8, height=1024, width=1024)
    assert torch.equal(by_size, model_schedule("flux.1-dev", 8, tokens=4096))
    assert torch.equal(by_size, schedule("dynamic", 8, tokens=4096))


def test_wan_unipc_starts_below_one_and_truncates():
    sigmas = model_schedule("wan2.1-t2v", 50)
    base = torch.linspace(0.999, 0, 51, dtype=F64)[:-1]
    torch.testing.assert_close(sigmas[:-1], 5 * base / (1 + 4 * base), rtol=1e-14, atol=0)
    timesteps = timesteps_for(sigmas[:-1], MODEL_SCHEDULES["wan2.1-t2v"].timesteps).tolist()
    assert timesteps[:3] == [999, 995, 991] and timesteps[-1] == 92
    plain = model_schedule("wan2.1-t2v", 50, grid="uniform")  # of its DPM-Solver++
    assert torch.equal(plain, schedule("shift", 50, shift=5.0))


def test_wan_shifts_by_task():
    shifts = {name: entry.factor for name, entry in MODEL_SCHEDULES.items() if name.startswith("wan2.1")}
    assert list(shifts.values()) == [5.0, 3.0, 5.0, 16.0, 16.0]


def test_hidream_full_does_not_use_its_configured_shift():
    base = torch.linspace(0.999, 0, 51, dtype=F64)[:-1]
    factor = math.exp(1.15)
    torch.testing.assert_close(
        model_schedule("hidream-i1-full")[:-1], factor * base / (1 + (factor - 1) * base), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("model, residue", [("hidream-i1-dev", 0.0348), ("hidream-i1-fast", 0.0089)])
def test_hidream_flash_ends_where_its_code_stops(model, residue):
    # Its code discards the last call, so this much noise stays in its pictures.
    assert model_schedule(model, compat="diffusers")[-2].item() == pytest.approx(residue, abs=6e-5)


def theirs(scheduler, steps, **options):
    scheduler.set_timesteps(steps, **options)
    return scheduler


def euler(**config):
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def uniform(steps):
    return np.linspace(1, 1 / steps, steps)


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize(
    "model, mu, config",
    [
        ("flux.1-dev", 1.15, {}),
        ("flux.2", None, {}),
        ("qwen-image", 0.9 - 0.4 * 4096 / 7936, {"shift_terminal": 0.02}),
        ("ltx-video", 2.05, {"shift_terminal": 0.1}),
    ],
)
def test_levels_are_those_of_the_pipeline(model, mu, config, steps):
    if model == "flux.2":
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        mu = compute_empirical_mu(4096, steps)
    if model == "qwen-image":
        mu = 0.5 + 0.4 * (4096 - 256) / (8192 - 256)
    if "shift_terminal" in config and steps == 1:  # diffusers divides by zero
        assert model_schedule(model, 1, tokens=4096).tolist() == [1, 0]
        return
    scheduler = theirs(euler(use_dynamic_shifting=True, **config), None, sigmas=uniform(steps), mu=mu)
    ours = model_schedule(model, steps, tokens=4096)
    torch.testing.assert_close(ours, scheduler.sigmas.double(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("model, factor", [("sd3-medium", 3.0), ("hidream-i1-dev", 6.0)])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_compat_levels_are_shifted_twice(model, factor, steps):
    scheduler = theirs(euler(shift=factor), steps)
    ours = model_schedule(model, steps, compat="diffusers")
    torch.testing.assert_close(ours, scheduler.sigmas.double(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_compat_levels_of_cogview4_are_whole_timesteps(steps):
    sigmas = np.linspace(1000, 1, steps).astype(np.int64).astype(np.float32) / 1000
    config = {"use_dynamic_shifting": True, "time_shift_type": "linear"}
    scheduler = theirs(euler(**config), None, sigmas=sigmas, mu=3.25)
    ours = model_schedule("cogview4", steps, tokens=4096, compat="diffusers")
    torch.testing.assert_close(ours, scheduler.sigmas.double(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_compat_levels_of_wan_are_those_of_unipc(steps):
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
    scheduler = theirs(diffusers.UniPCMultistepScheduler(**config), steps)
    ours = model_schedule("wan2.1-t2v", steps, compat="diffusers")
    torch.testing.assert_close(ours, scheduler.sigmas.double(), rtol=0, atol=2e-7)
    assert torch.equal(timesteps_for(ours[:-1], "int64"), scheduler.timesteps)


@pytest.mark.parametrize("steps", [2, 5, 64])
def test_levels_of_mochi_are_those_of_the_pipeline(steps):
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

    expected = torch.tensor(linear_quadratic_schedule(steps, 0.025), dtype=F64)
    torch.testing.assert_close(model_schedule("mochi-1", steps)[:-1], expected, rtol=0, atol=1e-14)
    scheduler = theirs(euler(invert_sigmas=True), None, sigmas=expected.tolist())
    times = invert(model_schedule("mochi-1", steps))
    torch.testing.assert_close(times, scheduler.sigmas.double(), rtol=0, atol=2e-7)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: model_schedule("sdxl"), "model must be one of flux.1-dev, .*, got 'sdxl'"),
        (lambda: model_schedule("flux.1-dev", 0), "steps must be a whole number of at least 1, got 0"),
        (lambda: model_schedule("flux.1-dev", 4), "needs height= and width=, or tokens=, got None and None"),
        (lambda: model_schedule("flux.2", 4, height=8, width=64), "height must be at least 16 for 'flux.2'"),
        (lambda: model_schedule("flux.2", 4, tokens=0), "tokens must be a whole number of at least 1, got 0"),
        (lambda: model_schedule("sd3-medium", 4, grid="log"), "grid must be one of uniform, unipc, .*'log'"),
        (lambda: model_schedule("sd3-medium", 4, compat="a"), "compat must be None or 'diffusers', got 'a'"),
    ],
)
def test_model_schedule_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
