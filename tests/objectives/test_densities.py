"""Samplers, densities and distributions of levels agree, and a level depends on its key alone."""

import pytest
import torch
from scipy import stats

from rfkernels.objectives import (
    Bump,
    CosMap,
    Density,
    LogitNormal,
    Mode,
    Rescaled,
    Shifted,
    Uniform,
    UShaped,
    bump_table,
    diffusers_sigma,
    loss_weight,
)
from rfkernels.ops import noise_keys, philox_normal
from tests.objectives.problem import F64, integrate

DENSITIES = [
    Uniform(), LogitNormal(), LogitNormal(1.0, 0.5), Mode(), Mode(-1.0), Mode(0.5), CosMap(), UShaped(),
    UShaped(2.0), Bump(), Rescaled(LogitNormal(1, 1), 1e-5 + 0.01, 1.0), Rescaled(UShaped(4), 1e-5, 1 - 1e-5),
    Rescaled(Uniform(), 0.0, 1 - 1e-3), Shifted(Uniform(), 3.0), Shifted(LogitNormal(), 3.0),
]  # fmt: skip
every_density = pytest.mark.parametrize("density", DENSITIES, ids=str)


@every_density
def test_samples_have_the_distribution(density):
    sigma = density.sample(noise_keys(7, 20_000))
    assert sigma.dtype == F64 and sigma.shape == (20_000,) and sigma.min() >= 0 and sigma.max() <= 1
    cdf = lambda t: density.cdf(torch.as_tensor(t)).numpy()
    assert stats.kstest(sigma.numpy(), cdf).pvalue > 1e-3


@every_density
def test_levels_of_frames_have_the_distribution(density):
    sigma = density.sample(noise_keys(8, 4), (5000,))
    cdf = lambda t: density.cdf(torch.as_tensor(t)).numpy()
    assert stats.kstest(sigma.flatten().numpy(), cdf).pvalue > 1e-3


@every_density
def test_density_is_the_slope_of_the_distribution(density):
    t = torch.linspace(0.03, 0.97, 60, dtype=F64)
    h = 1e-5
    slope = (density.cdf(t + h) - density.cdf(t - h)) / (2 * h)
    torch.testing.assert_close(density.pdf(t), slope, rtol=1e-6, atol=1e-7)
    # a pole at 0, and jumps inside a cell, take accuracy from the midpoint rule
    tolerance = 1e-2 if density == Mode(-1.0) else 3e-4 if isinstance(density, Rescaled) else 1e-6
    assert integrate(density.pdf, 0.0, 1.0) == pytest.approx(1, abs=tolerance)
    ends = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=F64)
    assert density.cdf(ends).tolist() == pytest.approx(
        [0, 0, 1, 1], abs=1e-8 if density == Mode(-1.0) else 1e-12
    )
    assert density.pdf(ends)[0] == 0 and density.pdf(ends)[3] == 0


@every_density
def test_transform_inverts_the_distribution(density):
    u = torch.linspace(0.001, 0.999, 99, dtype=F64)
    t = density.transform(u)
    rises = bool(t[-1] > t[0])
    torch.testing.assert_close(density.cdf(t), u if rises else 1 - u, rtol=0, atol=1e-11)


def test_golden_values():
    close = lambda a, b: torch.testing.assert_close(a, torch.tensor(b, dtype=F64), rtol=0, atol=1e-9)
    u = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.99], dtype=F64)
    close(UShaped(4).transform(u), [0.004865475, 0.053293683, 0.160763877, 0.5, 0.839236123, 0.995134525])
    u = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    close(Mode(1.29).transform(u), [0.802568547, 0.5, 0.197431453])
    close(CosMap().transform(u), [0.136728736, 0.5, 0.863271264])
    t = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    torch.testing.assert_close(
        UShaped(4).pdf(t), torch.tensor([2.07463, 0.55144, 2.07463], dtype=F64), rtol=0, atol=5e-6
    )


def test_a_level_depends_on_its_key_alone():
    keys = noise_keys(3, 8, step=5)
    together = LogitNormal().sample(keys)
    assert torch.equal(together[2:3], LogitNormal().sample(keys[2:3]))
    assert torch.equal(together, LogitNormal().sample(keys))
    later = keys + torch.tensor([0, 0, 1])
    assert not (together == LogitNormal().sample(later)).any()
    frames = Uniform().sample(keys, (2, 3))
    assert frames.shape == (8, 2, 3) and torch.equal(frames[4:5], Uniform().sample(keys[4:5], (2, 3)))


def test_levels_do_not_follow_the_noise():
    keys = noise_keys(3, 20_000)
    noise = philox_normal((20_000, 1), keys)[:, 0].double()
    assert abs(stats.spearmanr(Uniform().sample(keys), noise).statistic) < 4 / 20_000**0.5


def test_mode_is_monotone_in_its_range_alone():
    u = torch.linspace(0, 1, 10_001, dtype=F64)
    for s in (-1.0, 1.7519):
        assert (Mode(s).transform(u).diff() <= 0).all()
    for s in (-1.01, 1.8):
        with pytest.raises(ValueError, match="s must be in -1"):
            Mode(s)


def test_weights_and_densities_say_the_same():
    # Uniform levels under a weight are levels of the density under none.
    g = lambda t: (3 * t).sin() + t**2
    for name, density in (("cosmap", CosMap()), ("bump", Bump())):
        weighted = integrate(lambda t, name=name: loss_weight(name, t) * g(t), 0, 1)
        drawn = g(density.sample(noise_keys(1, 4), (2500,))).mean()
        assert float(drawn) == pytest.approx(weighted, abs=0.02)


def test_loss_weights():
    sigma = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    assert loss_weight("none", sigma).tolist() == [1, 1, 1]
    assert loss_weight("sigma_sqrt", sigma).tolist() == pytest.approx([1e6, 4, 1])
    assert loss_weight("cosmap", sigma).tolist() == pytest.approx([0.6366197724, 1.2732395447, 0.6366197724])
    assert loss_weight("bump", sigma)[0] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="got 'cos'"):
        loss_weight("cos", sigma)


def test_bump_table_is_the_published_one():
    timesteps = torch.linspace(1, 0, 1001, dtype=F64)[:-1] * 1000
    y = torch.exp(-2 * ((timesteps - 500) / 1000) ** 2)
    y = y - y.min()
    table = bump_table(timesteps / 1000)
    torch.testing.assert_close(table, y * (1000 / y.sum()), rtol=1e-12, atol=1e-12)
    assert float(table.mean()) == pytest.approx(1)
    torch.testing.assert_close(table, loss_weight("bump", timesteps / 1000), rtol=0, atol=5e-3)
    for sigmas in (torch.tensor([0.5]), torch.tensor([0.2, 0.2]), torch.tensor([])):
        with pytest.raises(ValueError, match="two levels or more"):
            bump_table(sigmas)


def test_the_sign_of_diffusers():
    t = torch.tensor([0.0, 0.0004, 0.25, 0.9999, 1.0], dtype=F64)
    assert diffusers_sigma(t).tolist() == pytest.approx([1.0, 1.0, 0.75, 0.001, 0.001])
    draws = LogitNormal(1.0, 1.0).sample(noise_keys(0, 4), (5000,))
    assert draws.mean() > 0.65 and diffusers_sigma(draws).mean() < 0.35  # a positive mean: little noise
    assert diffusers_sigma(draws, shift=3.0).mean() > diffusers_sigma(draws).mean() + 0.1


def test_the_sign_of_diffusers_is_that_of_its_scripts():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    u = torch.linspace(0, 0.9999, 500, dtype=F64)
    indices = (u * scheduler.config.num_train_timesteps).long()
    expected = scheduler.timesteps[indices].double() / 1000
    torch.testing.assert_close(diffusers_sigma(u, shift=3.0), expected, rtol=1e-5, atol=1e-6)


def test_weights_of_diffusers():
    training = pytest.importorskip("diffusers.training_utils")
    sigma = torch.linspace(0.001, 1, 100, dtype=F64)
    for name in ("none", "sigma_sqrt", "cosmap"):
        expected = training.compute_loss_weighting_for_sd3(name, sigma)
        torch.testing.assert_close(loss_weight(name, sigma), expected.double(), rtol=1e-6, atol=0)


def test_refusals():
    for call, message in [
        (lambda: LogitNormal(0, 0), "s must be positive"),
        (lambda: UShaped(0), "a must be"),
        (lambda: Rescaled(Uniform(), 0.5, 0.5), "low < high"),
        (lambda: Shifted(Uniform(), 0), "shift must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="abstract"):
        Density()
