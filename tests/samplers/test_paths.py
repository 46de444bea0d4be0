"""Other paths and predictions: conversions, DDIM as Euler's step, models of other kinds as velocities."""

import math

import pytest
import torch

from rfkernels.samplers import PATHS, PREDICTIONS, as_velocity, convert, sample, schedule, step_coefficients
from rfkernels.samplers.paths import conversion

F64 = torch.float64
X0, EPS = torch.randn(2, 4, 6, dtype=F64, generator=torch.Generator().manual_seed(3))
T = torch.tensor([0.1, 0.35, 0.6, 0.9], dtype=F64)
every_path = pytest.mark.parametrize("path", PATHS)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def kinds(x0, eps, alpha, sigma):
    return {
        "x0": x0, "eps": eps, "u": eps - x0, "w": alpha * eps - sigma * x0,
        "score": -eps / torch.where(sigma == 0, 1.0, sigma),
    }  # fmt: skip


@every_path
def test_path_begins_at_the_data_and_knows_its_time(path):
    path = PATHS[path]
    t = torch.linspace(0, 1, 21, dtype=F64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    assert alpha[0] == 1 and sigma[0] == 0 and (alpha.diff() < 0).all() and (sigma.diff() > 0).all()
    torch.testing.assert_close(path.time_of(sigma / alpha), t, rtol=0, atol=1e-9)
    torch.testing.assert_close(path.level(t) * path.scale(t), sigma)


def test_paths_are_what_their_names_say():
    t = torch.tensor(0.4, dtype=F64)
    alpha = math.exp(-0.25 * 0.4**2 * 19.9 - 0.5 * 0.4 * 0.1)
    assert [PATHS[n].alpha(t).item() for n in ("rf", "vp", "sub_vp", "cosine")] == pytest.approx(
        [0.6, alpha, alpha, math.cos(math.pi * 0.2)], abs=1e-14
    )
    assert [PATHS[n].sigma(t).item() for n in ("rf", "vp", "sub_vp", "cosine")] == pytest.approx(
        [0.4, (1 - alpha**2) ** 0.5, 1 - alpha**2, math.sin(math.pi * 0.2)], abs=1e-14
    )


@every_path
@every_prediction
@pytest.mark.parametrize("want", PREDICTIONS)
def test_every_prediction_says_the_same(path, prediction, want):
    alpha, sigma = PATHS[path].alpha(T), PATHS[path].sigma(T)
    a, s = alpha[:, None], sigma[:, None]
    known = kinds(X0, EPS, a, s)
    result = convert(a * X0 + s * EPS, known[prediction], prediction, want, alpha, sigma)
    torch.testing.assert_close(result, known[want], rtol=1e-10, atol=1e-10)


@every_path
@every_prediction
def test_ddim_is_the_rectified_flows_euler_step(path, prediction):
    path = PATHS[path]
    for start, end in ((0.9, 0.6), (0.6, 0.2), (0.2, 0.0)):
        a, s, a2, s2 = (
            f(torch.tensor(t, dtype=F64)).item() for t in (start, end) for f in (path.alpha, path.sigma)
        )
        x = a * X0 + s * EPS
        known = kinds(X0, EPS, a, torch.tensor(s, dtype=F64))[prediction]
        p, q = step_coefficients(prediction, a, s, a2, s2)
        z = x / (a + s) + (s2 / (a2 + s2) - s / (a + s)) * (EPS - X0)
        torch.testing.assert_close(p * x + q * known, z * (a2 + s2), rtol=0, atol=1e-10)


def test_the_rectified_flow_has_eulers_coefficients():
    assert step_coefficients("u", 0.4, 0.6, 0.55, 0.45) == pytest.approx((1.0, -0.15), abs=1e-15)


@pytest.mark.parametrize("prediction", ["u", "w"])
@pytest.mark.parametrize("alpha, sigma", [(0.0, 1.0), (1.0, 0.0)])
def test_u_and_w_are_finite_at_both_ends(prediction, alpha, sigma):
    for want in ("x0", "eps"):
        assert all(math.isfinite(v) for v in conversion(prediction, want, alpha, sigma))
    assert step_coefficients("score", 1.0, 0.0, 1.0, 0.0) == (1.0, 0.0)


@pytest.mark.parametrize("have, want, alpha, sigma, message", [
    ("eps", "x0", 0.0, 1.0, "eps says nothing about x0 where alpha is 0"),
    ("score", "u", 0.0, 1.0, "score says nothing about u where alpha is 0"),
    ("x0", "eps", 1.0, 0.0, "x0 says nothing about eps where sigma is 0"),
    ("u", "score", 1.0, 0.0, "u says nothing about score where sigma is 0"),
    ("noise", "x0", 0.5, 0.5, "prediction must be one of eps, x0, u, w, score, got 'noise'"),
])  # fmt: skip
def test_conversion_refuses(have, want, alpha, sigma, message):
    with pytest.raises(ValueError, match=message):
        conversion(have, want, alpha, sigma)


def gaussian(path, prediction, seen=None):
    """The exact prediction for data of N(.7, .5^2) along a path."""

    def model(x, t):
        alpha, sigma = (f(t.double())[:, None] for f in (PATHS[path].alpha, PATHS[path].sigma))
        if seen is not None:
            seen.append(t)
        variance = (0.5 * alpha) ** 2 + sigma**2
        x0 = 0.7 + alpha * 0.25 * (x - 0.7 * alpha) / variance
        eps = sigma * (x - 0.7 * alpha) / variance
        return kinds(x0, eps, alpha, sigma)[prediction].to(x.dtype)

    return model


@every_path
@every_prediction
@pytest.mark.parametrize("method", ["euler", "heun", "dpmpp_2m", "unipc", "ab2"])
def test_any_model_samples_with_any_method(path, prediction, method):
    """All are the same velocity, the rectified flow's, but for the ends."""
    x = torch.linspace(-2, 2, 7, dtype=F64)[:, None]
    top = min(0.99, float(PATHS[path].level(1.0)))
    grid = torch.linspace(top, 0.01, 9, dtype=F64)
    velocity = as_velocity(gaussian(path, prediction), prediction=prediction, path=path)
    expected = sample(gaussian("rf", "u"), x, grid, method=method)
    torch.testing.assert_close(sample(velocity, x, grid, method=method), expected, rtol=0, atol=1e-8)


@every_path
@every_prediction
def test_whole_grids_stay_finite(path, prediction):
    velocity = as_velocity(gaussian(path, prediction), prediction=prediction, path=path)
    x = torch.linspace(-2, 2, 7, dtype=F64)[:, None]
    for method in ("heun", "dpmpp_2m"):
        result = sample(velocity, x, schedule("linear", 64), method=method)
        torch.testing.assert_close(result, 0.7 + 0.5 * x, rtol=0, atol=0.05)


def test_models_get_their_time_and_guides_their_tuples():
    seen = []
    model = gaussian("cosine", "w", seen)
    pair = as_velocity(lambda x, t: (model(x, t / 1000), 2 * x), prediction="w", path="cosine",
                       time=lambda t: 1000 * t)  # fmt: skip
    x = torch.randn(3, 2)
    u, c = pair(x, torch.full((3,), 0.5))
    assert u.dtype == torch.float32 and u.shape == c.shape == x.shape
    torch.testing.assert_close(seen[0], torch.full((3,), 0.5))  # alpha = sigma in the middle
    sample(pair, x, schedule("linear", 3), guidance=2.0)


@pytest.mark.parametrize("change, message", [
    ({"path": "edm"}, "path must be one of rf, vp, sub_vp, cosine, got 'edm'"),
    ({"prediction": "v"}, "prediction must be one of eps, x0, u, w, score, got 'v'"),
])  # fmt: skip
def test_as_velocity_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        as_velocity(lambda x, t: x, **change)
