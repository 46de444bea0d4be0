"""Levels of DDPM-like models: their tables, and DDIM of diffusers as Euler's method along them."""

import diffusers
import pytest
import torch

from rfkernels.samplers import sample
from rfkernels.samplers.ddpm import ddpm_levels, ddpm_path, ddpm_timesteps

F64 = torch.float64
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("betas, last", [("linear", 0.00158), ("scaled_linear", 0.00466)])
def test_path_is_that_of_its_betas(betas, last):
    alpha, sigma = ddpm_path(betas)
    assert alpha[-1].item() ** 2 == pytest.approx(last, abs=6e-6)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, dtype=F64))
    theirs = diffusers.DDIMScheduler(beta_schedule=betas, **CONFIG).alphas_cumprod.double()
    torch.testing.assert_close(alpha**2, theirs, rtol=2e-4, atol=0)  # theirs is a product of float32


@pytest.mark.parametrize("steps", [1, 4, 7, 50, 1000])
def test_timesteps_trail_as_in_diffusers(steps):
    scheduler = diffusers.DDIMScheduler(**CONFIG)
    scheduler.set_timesteps(steps)
    assert torch.equal(ddpm_timesteps(steps), scheduler.timesteps)


@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
def test_ddim_is_eulers_method_along_the_levels(betas):
    predict = lambda x, t: torch.tanh(x) * (0.5 + t / 2000)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    scheduler = diffusers.DDIMScheduler(beta_schedule=betas, **CONFIG, set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    expected = x
    for t in scheduler.timesteps:
        expected = scheduler.step(predict(expected, t), t, expected).prev_sample
    levels, timesteps, scales = ddpm_levels(10, betas)
    assert (levels.diff() < 0).all() and levels[-1] == 0
    few = ddpm_path(betas, train_timesteps=100)
    assert ddpm_levels(10, few)[1].tolist() == list(range(99, 0, -10))
    calls = iter(zip(timesteps, scales, strict=True))

    def velocity(z, sigma):
        t, scale = next(calls)
        return (predict(scale * z, t) - z) / (1 - sigma[:, None])

    result = sample(velocity, x / scales[0], levels)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)  # their path is float32


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ddpm_path("cosine"), "betas must be one of linear, scaled_linear, got 'cosine'"),
        (lambda: ddpm_path(beta_start=0.0), "0 < beta_start <= beta_end < 1, got 0.0, 0.012"),
        (lambda: ddpm_timesteps(1001), "steps must be at most 1000, got 1001"),
        (lambda: ddpm_levels(0), "steps must be a whole number of at least 1, got 0"),
    ],
)
def test_ddpm_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
