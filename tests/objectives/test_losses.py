"""Losses: values, gradients, weights, and what they refuse."""

import pytest
import torch

from rfkernels.objectives import (
    LogitNormal,
    elementwise_huber,
    interpolate,
    loss_weight,
    lpips_huber,
    noise_loss_in_data_space,
    one_step_loss,
    pseudo_huber,
    squared_error,
    velocity_loss,
)
from rfkernels.ops import noise_keys
from tests.objectives.problem import F64, column, normal

i8 = torch.arange(8, dtype=F64)[None]
SIGMA = torch.tensor([0.1, 0.6, 0.95], dtype=F64)


def mean_square(d):
    return d.square().flatten(1).mean(1)


def test_velocity_loss_is_the_mean_square():
    v, target = normal(3, 4, 5), normal(3, 4, 5, seed=1)
    torch.testing.assert_close(velocity_loss(v, target), torch.nn.functional.mse_loss(v, target))
    each = velocity_loss(v, target, reduction="none")
    torch.testing.assert_close(each, mean_square(v - target))
    weight = torch.tensor([0.0, 1.0, 3.0], dtype=F64)
    torch.testing.assert_close(velocity_loss(v, target, weight=weight), (weight * each).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_losses_of_16_bit_tensors_are_float32(dtype):
    v = (300 * normal(2, 5000, dtype=torch.float32)).to(dtype).requires_grad_()  # squares overflow float16
    target = normal(2, 5000, seed=1, dtype=torch.float32).to(dtype)
    for loss in (velocity_loss(v, target), pseudo_huber(v, target)):
        assert loss.dtype == torch.float32 and loss.isfinite()
        (grad,) = torch.autograd.grad(loss, v)
        assert grad.dtype == dtype and grad.isfinite().all()
    expected = mean_square(v.double() - target.double()).mean()
    torch.testing.assert_close(velocity_loss(v, target).double(), expected, rtol=1e-6, atol=0)


def test_a_float32_target_beside_a_16_bit_prediction():
    v = normal(2, 50, dtype=torch.bfloat16).requires_grad_()
    target = normal(2, 50, seed=1, dtype=torch.float32)
    velocity_loss(v, target).backward()
    expected = (v.double() - target.double()) * 2 / 100
    assert v.grad.dtype == torch.bfloat16
    torch.testing.assert_close(v.grad.double(), expected.detach(), rtol=2**-8, atol=1e-6)


def test_weights_of_frames_have_an_effect():
    v, target = normal(2, 3, 4, 2), normal(2, 3, 4, 2, seed=1)
    weight = torch.rand(2, 1, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    expected = (weight[..., None] * (v - target) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(velocity_loss(v, target, weight=weight, reduction="none"), expected)
    one = torch.zeros(2, 1, 4, dtype=F64)
    one[:, :, 2] = 1
    (grad,) = torch.autograd.grad(velocity_loss(v.requires_grad_(), target, weight=one), v)
    assert grad[:, :, 2].abs().min() > 0 and not grad[:, :, [0, 1, 3]].any()


def test_pseudo_huber_matches_the_golden_value():
    x, y = torch.sin(i8 + 1), torch.sin(2 * i8) / 2
    assert float(pseudo_huber(x, y)) == pytest.approx(0.272714220, abs=1e-9)
    assert float(pseudo_huber(x, y, c=0.00054 * 8)) == float(pseudo_huber(x, y))


def test_pseudo_huber_of_nothing_is_zero_with_zero_gradient():
    x = normal(2, 8).requires_grad_()
    loss = pseudo_huber(x, x.detach())
    loss.backward()
    assert loss == 0 and not x.grad.any()
    # far below c it is a square: no cancellation
    near = x.detach() + 1e-12
    expected = ((near - x.detach()) ** 2).sum(1) / (2 * 0.00054 * 8) / 8
    torch.testing.assert_close(pseudo_huber(near, x.detach(), reduction="none"), expected, rtol=1e-6, atol=0)


def test_elementwise_huber():
    x, y = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    d = 0.7 * x - 1.2 * y
    expected = ((d * d + 1e-6).sqrt() - 1e-3).flatten(1).mean(1)
    result = elementwise_huber([x, y], [0.7, -1.2], reduction="none")
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-15)


def test_noise_is_compared_as_data():
    x0, noise, eps = (normal(3, 5, seed=s) for s in range(3))
    alpha, sigma = (1 - SIGMA**2).sqrt(), SIGMA
    x = column(alpha, x0) * x0 + column(sigma, x0) * noise
    d = (x - column(sigma, x0) * eps) / column(alpha, x0) - x0
    expected = ((d * d + 1e-6).sqrt() - 1e-3).mean()
    torch.testing.assert_close(noise_loss_in_data_space(eps, x, x0, alpha, sigma), expected)
    torch.testing.assert_close(
        noise_loss_in_data_space(noise, x, x0, alpha, sigma), torch.tensor(0.0, dtype=F64), rtol=0, atol=1e-12
    )
    mixed = noise_loss_in_data_space(eps.bfloat16(), x.float(), x0.float(), alpha, sigma)
    torch.testing.assert_close(mixed.double(), expected, rtol=0.02, atol=0)
    with pytest.raises(ValueError, match="alpha 0"):
        noise_loss_in_data_space(eps, x, x0, torch.zeros(3), sigma)


def test_lpips_huber_is_a_blend():
    x0, noise, v = (normal(3, 4, seed=s) for s in range(3))
    s = column(SIGMA, x0)
    x = (1 - s) * x0 + s * noise
    distance = lambda a, b: (a - b).abs().mean(1).view(-1, 1, 1, 1)
    huber = pseudo_huber(v, noise - x0, reduction="none")
    perceived = distance(x0, x - s * v).view(-1)
    expected = (1 - SIGMA) * huber + perceived
    result = lpips_huber(v, x, x0, noise, SIGMA, distance, reduction="none")
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)
    divided = lpips_huber(v, x, x0, noise, SIGMA, distance, divide_by_sigma=True)
    torch.testing.assert_close(divided, ((1 - SIGMA) * huber + perceived / SIGMA).mean())
    with pytest.raises(ValueError, match="one distance a sample"):
        lpips_huber(v, x, x0, noise, SIGMA, lambda a, b: a - b)


def test_one_step_loss_compares_data():
    v, noise, x0 = (normal(3, 4, seed=s) for s in range(3))
    torch.testing.assert_close(one_step_loss(v, noise, x0), mean_square(noise - v - x0).mean())
    assert float(one_step_loss(noise - x0, noise, x0)) < 1e-30


LOSSES = {
    "velocity": lambda v, t: velocity_loss(v, t),
    "weighted": lambda v, t: velocity_loss(v, t, weight=SIGMA),
    "frames": lambda v, t: velocity_loss(v, t, weight=1 + normal(3, 1, 2).abs()),
    "huber": lambda v, t: pseudo_huber(v, t, weight=SIGMA),
    "huber near": lambda v, t: pseudo_huber(v, t, c=2.0),
    "elements": lambda v, t: elementwise_huber([v, t], [1.0, -0.5], c=0.1),
    "data": lambda v, t: noise_loss_in_data_space(v, t, normal(3, 4, 2, seed=5), 1 - SIGMA, SIGMA, c=0.1),
    "one step": lambda v, t: one_step_loss(v, t, normal(3, 4, 2, seed=7)),
    "lpips": lambda v, t: lpips_huber(
        v, t, normal(3, 4, 2), normal(3, 4, 2, seed=3), SIGMA, lambda a, b: mean_square(a - b)
    ),
    "any": lambda v, t: squared_error([v, t, v], [0.5, -1.0, 2.0]).sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_exact(name):
    v, target = normal(3, 4, 2).requires_grad_(), normal(3, 4, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(LOSSES[name], (v, target))


@pytest.mark.parametrize("name", ["weighted", "huber", "elements", "one step"])
def test_losses_compile_as_one_graph(name):
    v, target = normal(3, 4, 2).requires_grad_(), normal(3, 4, 2, seed=1)
    if name == "one step":  # what it draws is outside
        other = normal(3, 4, 2, seed=7)
        loss = lambda v, t: one_step_loss(v, t, other)
    else:
        loss = LOSSES[name]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(v, target), loss(v, target), rtol=1e-14, atol=0)
    (a,), (b,) = (torch.autograd.grad(f(v, target), v) for f in (compiled, loss))
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_a_training_step_compiles_as_one_graph():
    x0, keys, weights = normal(3, 4, 2), noise_keys(0, 3), normal(2, 2, seed=1).requires_grad_()

    def step(x0, keys, weights):
        sigma = LogitNormal().sample(keys)
        x, target = interpolate(x0, sigma, keys=keys)
        return velocity_loss(x @ weights, target, weight=loss_weight("cosmap", sigma))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    losses = compiled(x0, keys, weights), step(x0, keys, weights)
    torch.testing.assert_close(*losses, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, weights) for loss in losses), rtol=1e-13, atol=1e-15
    )


def test_refusals():
    v = normal(2, 3)
    for call, message in [
        (lambda: velocity_loss(v, v, reduction="sum"), "reduction must be .* got 'sum'"),
        (lambda: velocity_loss(v[:, :0], v[:, :0]), r"with elements, got \[2, 0\]"),
        (lambda: velocity_loss(v[:0], v[:0]), "without samples"),
        (lambda: pseudo_huber(v, v, c=0.0), "c must be positive"),
        (lambda: pseudo_huber(v, v, weight=torch.ones(2, 1)), r"must be \[batch\], got \[2, 1\]"),
        (lambda: elementwise_huber([v], [1.0], c=-1.0), "c must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
