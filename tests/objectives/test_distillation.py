"""Targets from teachers and from the student: fixed points on problems with exact answers."""

import importlib

import pytest
import torch

from rfkernels.objectives import (
    RectifiedPath,
    consistency_matching_loss,
    distill_sigma,
    edm_denoiser,
    edm_velocity,
    guided_point,
    guided_target,
    interpolate,
    matching_target,
    reflow_pairs,
    shortcut_steps,
    shortcut_target,
    straightening_target,
    transport_cost,
    velocity_distillation_loss,
    velocity_loss,
)
from rfkernels.ops import noise_keys, philox_normal
from rfkernels.samplers import schedule
from tests.objectives.problem import F64, Gaussian, column, mixture_samples, mixture_velocity, normal

GAUSS = Gaussian()
SIGMA = torch.tensor([0.2, 0.5, 1.0], dtype=F64)


def exact_student(x, sigma):
    return GAUSS.average(x, column(sigma, x))


def teacher(x, sigma=SIGMA):
    return GAUSS.velocity(x, column(sigma, x))


def test_matching_has_its_fixed_point_at_the_average_velocity():
    x = normal(3, 6)
    u = exact_student(x, SIGMA)
    target = matching_target(exact_student, teacher(x), x, SIGMA, mode="continuous")
    torch.testing.assert_close(target, u, rtol=0, atol=1e-12)
    assert not target.requires_grad
    # the discrete derivative is of first order in delta
    errors = [
        float((matching_target(exact_student, teacher(x), x, SIGMA, delta=d) - u).abs().max())
        for d in (0.02, 0.01, 0.005)
    ]
    assert 1.8 < errors[0] / errors[1] < 2.2 and 1.8 < errors[1] / errors[2] < 2.2 and errors[2] < 0.02
    given = matching_target(exact_student, teacher(x), x, SIGMA, u=u)
    assert torch.equal(given, matching_target(exact_student, teacher(x), x, SIGMA))


def test_matching_is_not_met_by_the_velocity():
    x = normal(3, 6)
    target = matching_target(teacher, teacher(x), x, SIGMA, mode="continuous")
    assert (target - teacher(x)).abs().max() > 0.1


@pytest.mark.parametrize("mode", ["continuous", "discrete"])
def test_norm_bounds_the_correction_of_a_sample(mode):
    x = normal(3, 6)
    v = teacher(x)
    free, bound = (
        matching_target(exact_student, v, x, SIGMA, mode=mode, d_norm=n) - v for n in (False, True)
    )
    d = -free / SIGMA[:, None]
    expected = -SIGMA[:, None] * d / (d.norm(dim=1, keepdim=True) + 0.1)
    torch.testing.assert_close(bound, expected, rtol=1e-9, atol=1e-12)
    assert (bound.norm(dim=1) < 1).all()


def test_average_velocity_samples_in_one_step():
    x = normal(3, 6)
    torch.testing.assert_close(
        x - column(SIGMA, x) * exact_student(x, SIGMA), GAUSS.flow(x, column(SIGMA, x)), rtol=0, atol=1e-14
    )


def test_consistency_matching_is_met_by_the_exact_student():
    x, goal = normal(3, 6), SIGMA / 2
    # u(x, t) towards sigma*: x - (t - t*) u is where the flow is at t*
    student = lambda x, t: (x - GAUSS.flow(x, column(t, x), column(goal, x))) / column(t - goal, x)
    losses = [
        float(consistency_matching_loss(student, teacher(x), x, SIGMA, goal, delta=d)) for d in (0.02, 0.01)
    ]
    assert losses[1] < 1e-6 and 12 < losses[0] / losses[1] < 20  # an Euler step errs by delta^2
    wrong = consistency_matching_loss(lambda x, t: 2 * student(x, t), teacher(x), x, SIGMA, goal)
    assert wrong > 100 * losses[0]


def test_consistency_matching_trains_the_upper_point_alone():
    x, scale = normal(3, 6), torch.tensor(1.0, dtype=F64, requires_grad=True)
    calls = []

    def student(x, t):
        calls.append(torch.is_grad_enabled())
        return scale * teacher(x, t)

    consistency_matching_loss(student, teacher(x), x, SIGMA, SIGMA / 2).backward()
    assert calls == [False, True] and scale.grad != 0


def test_velocity_distillation_has_the_value_and_the_gradient():
    noise, u, v = (normal(3, 6, seed=s) for s in range(3))
    u_noise = normal(3, 6, seed=4).requires_grad_()
    loss = velocity_distillation_loss(u_noise, u.requires_grad_(), v.requires_grad_())
    torch.testing.assert_close(loss, (u - v).square().mean(), rtol=1e-14, atol=0)
    grads = torch.autograd.grad(loss, (u_noise, u, v), allow_unused=True)
    torch.testing.assert_close(grads[0], 2 * (u - v).detach() / 18, rtol=1e-14, atol=0)
    assert grads[1] is None and grads[2] is None
    # descent moves the one-step sample along u - v
    moved = noise - (u_noise - 0.1 * grads[0]).detach()
    torch.testing.assert_close(moved - (noise - u_noise.detach()), 0.1 * grads[0], rtol=1e-9, atol=1e-15)


def test_guided_target_of_a_straight_flow_is_its_velocity():
    x0, noise = normal(3, 6), normal(3, 6, seed=1)
    v = noise - x0
    point = guided_point(noise, v, SIGMA)
    torch.testing.assert_close(point, interpolate(x0, SIGMA, noise)[0], rtol=0, atol=1e-15)
    torch.testing.assert_close(guided_target(v, v, SIGMA), v, rtol=0, atol=1e-15)


def test_guided_target_is_two_steps_in_one():
    noise = normal(3, 6)
    v = 0.8 * noise - 0.1
    point = guided_point(noise, v, SIGMA)
    second = teacher(point)
    # The authors' form, t from noise: x_t + (1 - t) v_T - z, with velocities the other way round.
    t = column(1 - SIGMA, noise)
    x_t = noise + t * (-v)
    expected = -(x_t + (1 - t) * (-second) - noise)
    torch.testing.assert_close(point, x_t, rtol=0, atol=1e-15)
    torch.testing.assert_close(guided_target(v.requires_grad_(), second, SIGMA), expected, rtol=0, atol=1e-14)
    assert (
        not guided_target(v, second, SIGMA).requires_grad and not guided_point(noise, v, SIGMA).requires_grad
    )


def test_shortcut_residual_is_zero_for_exact_steps():
    # A step of size d of the exact flow of a linear field.
    def exact(x, sigma, d):
        rate = 0.7
        d = column(d, x)
        return (x - x * torch.exp(-rate * d)) / d  # dx/dsigma = rate x, d towards the data

    x, d = normal(3, 6), torch.tensor([0.5, 0.25, 1.0], dtype=F64)
    torch.testing.assert_close(shortcut_target(exact, x, SIGMA, d), exact(x, SIGMA, d), rtol=0, atol=1e-14)
    affine = lambda x, sigma, d: (x - GAUSS.flow(x, column(sigma, x), column(sigma - d, x))) / column(d, x)
    d = torch.tensor([0.125, 0.25, 0.5], dtype=F64)
    torch.testing.assert_close(shortcut_target(affine, x, SIGMA, d), affine(x, SIGMA, d), rtol=0, atol=1e-13)


def test_shortcut_targets_of_no_step_are_flow_matching():
    x, flow, d = normal(3, 6), normal(3, 6, seed=1), torch.tensor([0.0, 0.5, 0.0], dtype=F64)
    velocity = lambda x, sigma, d: x * column(sigma + d, x)
    target = shortcut_target(velocity, x, SIGMA, d, flow)
    assert torch.equal(target[0], flow[0]) and torch.equal(target[2], flow[2])
    assert torch.equal(target[1], shortcut_target(velocity, x, SIGMA, d)[1])


def test_shortcut_steps_are_powers_of_two_for_a_quarter():
    d = shortcut_steps(noise_keys(0, 8000), 4)
    assert set(d.tolist()) == {0.0, 1.0, 0.5, 0.25, 0.125}
    assert abs(float((d > 0).double().mean()) - 0.25) < 4 * (0.25 * 0.75 / 8000) ** 0.5
    for size in (1.0, 0.5, 0.25, 0.125):
        assert abs(float((d == size).double().mean()) - 0.0625) < 4 * (0.0625 * 0.9375 / 8000) ** 0.5
    assert not shortcut_steps(noise_keys(0, 50), 4, fraction=0.0).any()


def test_straightening_targets_are_slopes():
    x, x_next = normal(3, 6), normal(3, 6, seed=1)
    torch.testing.assert_close(straightening_target(x, x_next, 0.8, 0.3), (x_next - x) / -0.5)
    rows = torch.tensor([1.0, 0.9, 0.8], dtype=F64)
    expected = (x_next - x) / column(rows / 2 - rows, x)
    torch.testing.assert_close(straightening_target(x, x_next, rows, rows / 2), expected)
    # on a straight trajectory it is the velocity
    x0, noise = normal(3, 6), normal(3, 6, seed=1)
    at = [interpolate(x0, torch.full((3,), s, dtype=F64), noise)[0] for s in (0.8, 0.3)]
    torch.testing.assert_close(straightening_target(*at, 0.8, 0.3), noise - x0, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="levels must differ"):
        straightening_target(x, x_next, 0.5, 0.5)


def test_distillation_levels():
    keys = noise_keys(0, 4000)
    assert (distill_sigma("t0", keys) == 1 - 1e-3).all() and (distill_sigma("t1", keys) == 0).all()
    levels = distill_sigma("k", keys, k=4)
    expected = [1 - (i / 4 * 0.999 + 0.001) for i in range(4)]
    assert sorted(set(levels.tolist())) == pytest.approx(sorted(expected))
    for value in expected:
        share = float(((levels - value).abs() < 1e-9).double().mean())
        assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert torch.equal(distill_sigma("k", keys, k=1), distill_sigma("t0", keys))


@pytest.mark.parametrize("sigma", [1e-5, 1e-3, 0.3, 0.5, 0.9, 0.999])
def test_edm_velocity_is_that_of_the_flow(sigma):
    x, t = normal(4, 5), torch.full((4,), sigma, dtype=F64)
    v = edm_velocity(GAUSS.denoiser, x, t)
    expected = GAUSS.velocity(x, column(t, x))
    torch.testing.assert_close(v, expected, rtol=1e-12, atol=1e-12 if sigma > 0.01 else 1e-10)


def test_edm_velocity_is_finite_at_the_ends():
    t = torch.tensor([0.0, 1.0], dtype=F64)
    v = edm_velocity(GAUSS.denoiser, normal(2, 5), t)
    expected = GAUSS.velocity(normal(2, 5), column(t, normal(2, 5)))
    torch.testing.assert_close(v, expected, rtol=0, atol=1e-3)
    half = edm_velocity(GAUSS.denoiser, normal(2, 5, dtype=torch.float16), t)  # 1e5 |x| overflows float16
    assert half.dtype == torch.float16 and half[1].isfinite().all()


def test_edm_preconditioning():
    seen = []

    def network(x, noise):
        seen.append((x, noise))
        return 0.3 * x

    x, s = normal(2, 5), torch.tensor([0.2, 3.0], dtype=F64)
    out = edm_denoiser(network)(x, s)
    c = column(s, x)
    torch.testing.assert_close(seen[0][0], x / (c**2 + 0.25).sqrt())
    torch.testing.assert_close(seen[0][1], s.log() / 4)
    expected = 0.25 / (c**2 + 0.25) * x + c * 0.5 / (c**2 + 0.25).sqrt() * 0.3 * seen[0][0]
    torch.testing.assert_close(out, expected)


def test_reflow_lowers_the_transport_cost():
    # The mixture: independent pairs cost 2.67, pairs of the flow .2416 (the optimal map in one dimension).
    count = 20_000
    x0, noise = mixture_samples(count, seed=1), normal(count, 1, seed=2)
    independent = transport_cost(x0, noise)
    made, start = reflow_pairs(mixture_velocity, noise_keys(3, count), (count, 1), schedule("linear", 24))
    rectified = transport_cost(made, start)
    assert start.dtype == torch.float32 and torch.equal(
        start, philox_normal((count, 1), noise_keys(3, count))
    )
    for cost, expected in ((independent, 2.6731), (rectified, 0.2416)):
        assert abs(float(cost.mean()) - expected) < 4 * float(cost.std()) / count**0.5 + 2e-3
    # the map is monotone, and the marginal is the data's
    order = start[:, 0].argsort()
    half, _ = interpolate(made, 0.5, start)
    assert (half[order, 0].diff() > -1e-4).all()  # lines do not cross: the second flow is straight
    assert (made[order, 0].diff() > -1e-4).all()
    assert abs(float(made.mean()) - 0.25) < 0.04


def test_pairs_and_a_linear_map_have_an_exact_velocity():
    # z1 = A z0 + b: v(x, t) = (A - I)((1 - t) I + t A)^-1 (x - t b) + b, and any Euler grid gives A z0 + b.
    a = torch.tensor([[1.5, 0.3], [0.3, 0.8]], dtype=F64)
    b, eye, z0 = torch.tensor([0.4, -0.2], dtype=F64), torch.eye(2, dtype=F64), normal(5, 2)
    x0 = z0 @ a.T + b

    def v(x, sigma):  # towards the noise
        t = 1 - float(sigma[0])
        return -((a - eye) @ torch.linalg.solve((1 - t) * eye + t * a, (x - t * b).T)).T - b

    sigma = torch.full((5,), 0.3, dtype=F64)
    x, target = interpolate(x0, sigma, z0)
    assert float(velocity_loss(v(x, sigma), target)) < 1e-28
    sampler = importlib.import_module("rfkernels.samplers")
    for steps in (1, 2, 7):
        end = sampler.sample(v, z0, schedule("linear", steps))
        torch.testing.assert_close(end, x0, rtol=0, atol=1e-14)


def test_mdt_path():
    x0, noise = normal(3, 6), normal(3, 6, seed=1)
    x, target = interpolate(x0, SIGMA, noise, path=RectifiedPath(1e-5))
    s = column(SIGMA, x0)
    torch.testing.assert_close(x, (1 - s) * x0 + (1e-5 + (1 - 1e-5) * s) * noise, rtol=0, atol=1e-15)
    torch.testing.assert_close(target, (1 - 1e-5) * noise - x0, rtol=0, atol=1e-15)


def test_16_bit_velocities_and_levels_in_float32():
    x = normal(2, 8, dtype=torch.float32)
    sigma = torch.tensor([0.3, 0.8], dtype=F64)
    seen = []

    def student(x, t):
        seen.append((x.dtype, t.dtype))
        return x.bfloat16()

    target = matching_target(student, x.bfloat16(), x, sigma)
    assert target.isfinite().all() and set(seen) == {(torch.float32, torch.float32)}
    shortcut = shortcut_target(lambda x, t, d: student(x, t), x, sigma, sigma / 2)
    torch.testing.assert_close(shortcut.float(), x - column(sigma / 8, x) * x, rtol=0.02, atol=0.02)


def test_refusals():
    x, keys = normal(3, 6), noise_keys(0, 3)
    for call, message in [
        (lambda: matching_target(teacher, x, x, SIGMA, mode="cm"), "got 'cm'"),
        (lambda: matching_target(teacher, x, x, SIGMA, delta=0.0), "delta > 0"),
        (lambda: guided_point(x, x, torch.ones(2)), r"a number or \[3\], got \[2\]"),
        (lambda: distill_sigma("t2", keys), "got 't2'"),
        (lambda: distill_sigma("k", keys, k=0), "k >= 1"),
        (lambda: shortcut_steps(keys, 0), "halvings >= 1"),
        (lambda: edm_denoiser(lambda x, s: x, sigma_data=0.0), "sigma_data"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
