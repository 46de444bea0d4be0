"""FlowChef: closed forms against their loops, golden values, operators, rates, and rewards."""

import math
from itertools import pairwise

import pytest
import torch

from rfkernels.editing import Descent, Keep, Linear, Separable, flow_chef, pull_of, reward_guided
from rfkernels.editing import operators as op
from rfkernels.samplers import sample, schedule
from tests.editing.fields import (
    END,
    F64,
    MASK,
    SIGMA,
    C,
    X,
    Y,
    close,
    column,
    guided,
    normal,
    wild,
    wild_pair,
)
from tests.editing.test_inversion import draw, launches  # noqa: F401

GRID = schedule("shift", 5, shift=2.0)


def looped(field, x, grid, descend, stop=99):
    """The definition: gradient steps on the estimate, then Euler with the same velocity."""
    for i, (a, b) in enumerate(pairwise(grid.tolist())):
        v = field(x, torch.full((len(x),), a, dtype=F64))
        if i < stop:
            x = descend(i, x - a * v) + a * v
        x = x + (b - a) * v
    return x


def test_golden_step():
    keep = Keep(Y[None], MASK[None], pull=0.8, inner=3)
    result = flow_chef(lambda x, s: C[None], X[None], torch.tensor([SIGMA, END], dtype=F64), keep)
    expected = [0.397431524, 0.853068764, -0.507043593, -0.633894182, 0.065684303, -0.190743955, -0.233009708,
                0.881029315]  # fmt: skip
    close(result[0], expected, 2e-9)


@pytest.mark.parametrize("inner, pull", [(1, 0.3), (4, 0.3), (5, 1.9), (0, 0.5)])
@pytest.mark.parametrize("guidance", [None, 2.5, torch.tensor([0.5, 3.0])])
def test_masked_closed_form_is_the_loop(inner, pull, guidance):
    x, y, mask = draw(2, 3, 4), draw(2, 3, 4, seed=1), (draw(3, 4, seed=2) > 0).double()
    field = wild if guidance is None else guided(wild_pair, guidance)
    steer = Keep(y, mask, pull, inner, whole_until=2)

    def descend(i, x0):
        for _ in range(inner):
            leaf = x0.clone().requires_grad_()
            weight = mask if i >= 2 else torch.ones_like(mask)
            (pull / 2 * (weight * (leaf - y) ** 2).sum()).backward()
            x0 = x0 - leaf.grad
        return x0

    result = flow_chef(wild if guidance is None else wild_pair, x, GRID, steer, stop=4, guidance=guidance)
    close(result, looped(field, x, GRID, descend, 4), 1e-10)


def test_released_rate():
    """mean(1000 m (x0 - y)^2) with lr; the step of FLUX is weak, that of a toy diverges."""
    x, y, n = draw(1, 4000), draw(1, 4000, seed=1), 4000
    pull = pull_of(0.7, n)
    assert 1 - pull_of(0.5, 262144) == pytest.approx(0.9962, abs=5e-5)
    assert 1 - pull_of(500 / 1000, 3 * 64 * 64) == pytest.approx(0.9186, abs=5e-5)

    def descend(i, x0):
        leaf = x0.clone().requires_grad_()
        (1000 * (leaf - y) ** 2).mean().backward()
        return x0 - 0.7 * leaf.grad

    close(flow_chef(wild, x, GRID, Keep(y, pull=pull)), looped(wild, x, GRID, descend), 1e-10)
    with pytest.raises(ValueError, match=r"got 10: lr 0.5 needs more than 500 elements, got 100"):
        pull_of(0.5, 100)


def test_masked_guidance():
    x, y, mask = draw(2, 6), draw(2, 6, seed=1), torch.tensor([1.0, 0, 0.5, 0, 1, 0], dtype=F64)

    def field(x, sigma):
        u, c = wild_pair(x, sigma)
        return c + (1 - mask) * (c - u) * 4.5

    result = flow_chef(wild_pair, x, GRID, Keep(y, mask, pull=0.0), masked_guidance=4.5)
    close(result, sample(field, x, GRID))
    result = flow_chef(wild_pair, x, GRID, Keep(y, (mask == 1).double(), 0.4), masked_guidance=4.5)
    mask = (mask == 1).double()
    close(result, looped(field, x, GRID, lambda i, x0: x0 - 0.4 * mask * (x0 - y)))


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_no_pull_is_euler_to_the_bit(dtype):
    x = draw(2, 6).to(dtype)
    field = lambda x, s: wild(x, s)
    for steer, stop in ((Keep(x, pull=0.0), None), (Keep(x), 0), (Descent(lambda x0: x0.sum(), 0.1), 0)):
        assert torch.equal(flow_chef(field, x, GRID, steer, stop=stop), sample(field, x, GRID))


def test_full_pull_ends_in_the_target():
    x, y = draw(2, 6), draw(2, 6, seed=1)
    close(flow_chef(wild, x, GRID, Keep(y)), y, 1e-14)
    mask = torch.tensor([1.0, 0, 1, 0, 1, 0], dtype=F64)
    result = flow_chef(wild, x, GRID, Keep(y, mask))
    close(result[:, ::2], y[:, ::2], 1e-14)


def test_a_masked_step_is_one_launch(launches):  # noqa: F811
    flow_chef(wild_pair, draw(2, 6), GRID, Keep(draw(2, 6), MASK[:6], 0.3, 5), guidance=3.0)
    assert len(launches) == len(GRID) - 1


def operators(height=12, width=8):
    blur = op.gaussian_blur(height, 6, 2.0), op.gaussian_blur(width, 5, 1.0)
    pool = op.pooling(height, 4), op.pooling(width, 4)
    return {"blur": blur, "pool": pool, "crop": (op.crop(height, 2, 9), op.crop(width, 0, 5)),
            "mixed": (pool[0], blur[1])}  # fmt: skip


@pytest.mark.parametrize("kind", ["blur", "pool", "crop", "mixed"])
@pytest.mark.parametrize("inner", [1, 7])
@pytest.mark.parametrize("pull", [0.6, 1.7])
def test_separable_closed_form_is_the_loop(kind, inner, pull):
    rows, columns = operators()[kind]
    x = draw(2, 3, 12, 8)
    y = op.measure(draw(2, 3, 12, 8, seed=1), rows, columns)
    norm = torch.linalg.matrix_norm(rows, 2) * torch.linalg.matrix_norm(columns, 2)

    def descend(i, x0):
        for _ in range(inner):
            r = rows @ x0 @ columns.T - y
            x0 = x0 - pull / norm**2 * rows.T @ r @ columns
        return x0

    expected = looped(wild, x, GRID, descend)
    close(flow_chef(wild, x, GRID, Separable(y, rows, columns, pull, inner)), expected, 1e-11)
    apply = lambda t: rows @ t @ columns.T
    for adjoint in (lambda t: rows.T @ t @ columns, None):
        linear = Linear(y, apply, adjoint, pull=pull, norm=norm.item(), inner=inner)
        close(flow_chef(wild, x, GRID, linear), expected, 1e-11)


def test_pooling_is_a_scalar_form_and_projects_at_once():
    rows, columns = operators()["pool"]
    x, truth = draw(2, 3, 12, 8), draw(2, 3, 12, 8, seed=1)
    y = op.measure(truth, rows, columns)
    close(y, torch.nn.functional.avg_pool2d(truth, 4))
    result = flow_chef(wild, x, GRID, Separable(y, rows, columns))
    close(op.measure(result, rows, columns), y)
    many = flow_chef(wild, x, GRID, Separable(y, rows, columns, 0.5, 2000))
    close(flow_chef(wild, x, GRID, Separable(y, rows, columns, 0.5, math.inf)), many)


def test_blur_without_end_is_least_squares():
    """Directions that a blur all but loses are left alone; the others fit."""
    rows, columns = operators()["blur"]
    x, truth = draw(1, 1, 12, 8), draw(1, 1, 12, 8, seed=1)
    y = op.measure(truth, rows, columns)
    result = flow_chef(wild, x, GRID, Separable(y, rows, columns, 1.0, math.inf))
    close(op.measure(result, rows, columns), y, 1e-9)
    assert flow_chef(wild, x, GRID, Separable(y, rows, columns, 1.0, 10**9)).isfinite().all()


def test_operators():
    blur = op.gaussian_blur(200, 50, 20.0)
    assert (blur[100] > 0).sum() == 51  # an even kernel becomes odd
    close(blur[100].sum(), 1.0)
    close(blur[100, 75:126], blur[100, 75:126].flip(0))
    assert blur[0].sum() < 1
    mask = op.box(6, 8, 1, 2, 4, 7)
    assert mask.shape == (6, 8) and mask.sum() == 48 - 15 and not mask[1:4, 2:7].any()
    with pytest.raises(ValueError, match="factor must divide size, got 5 and 12"):
        op.pooling(12, 5)
    with pytest.raises(ValueError, match="0 <= start < stop <= 6 is required, got 4 and 4"):
        op.crop(6, 4, 4)
    with pytest.raises(ValueError, match="sigma > 0 are required, got 3 and 0"):
        op.gaussian_blur(6, 3, 0)


def test_descent_on_any_loss():
    x, y, w = draw(2, 6), draw(2, 6, seed=1), draw(6, 4, seed=2)

    def descend(i, x0):
        for _ in range(3):
            leaf = x0.clone().requires_grad_()
            torch.nn.functional.cross_entropy(leaf @ w, torch.tensor([1, 3]), reduction="sum").backward()
            x0 = x0 - 0.3 * leaf.grad
        return x0

    loss = lambda x0: torch.nn.functional.cross_entropy(x0 @ w, torch.tensor([1, 3]), reduction="none")
    result = flow_chef(wild, x, GRID, Descent(loss, 0.3, inner=3))
    close(result, looped(wild, x, GRID, descend))
    assert loss(result).mean() < loss(sample(wild, x, GRID)).mean()
    square = lambda x0: ((x0 - y) ** 2).sum() / 2
    close(flow_chef(wild, x, GRID, Descent(square, 0.3, inner=2)),
          flow_chef(wild, x, GRID, Keep(y, pull=0.3, inner=2)))  # fmt: skip
    with torch.inference_mode():
        close(flow_chef(wild, x.clone(), GRID, Descent(loss, 0.3, inner=3)).clone(), result)


def test_fresh_adam_makes_the_scale_of_the_loss_the_rate():
    x, y = draw(2, 6), draw(2, 6, seed=1)
    for scale in (1.0, 1e-10):

        def descend(i, x0, scale=scale):
            leaf = x0.clone().requires_grad_()
            adam = torch.optim.Adam([leaf], lr=0.02)
            (scale * (leaf - y) ** 2).sum().backward()
            adam.step()
            return leaf.detach()

        loss = lambda x0, scale=scale: scale * (x0 - y) ** 2
        result = flow_chef(wild, x, GRID, Descent(loss, 0.02, optimizer="adam"))
        close(result, looped(wild, x, GRID, descend), 1e-7)


def test_reward_tilts_a_normal():
    """N(m, s^2) under a reward w c x0 moves by w c s^2: .2 for c = .8, s = .5."""
    m, s, c = 0.7, 0.5, 0.8

    def reward(x, sigma):  # log E[exp(c x0) | x], exactly
        a = 1 - column(sigma, x)
        variance = a**2 * s**2 + (1 - a) ** 2
        posterior = m + a * s**2 * (x - a * m) / variance
        return (c * posterior + c**2 / 2 * s**2 * (1 - a) ** 2 / variance).sum(1)

    x = draw(5, 3)
    plain = sample(normal(m, s), x, schedule("linear", 400), method="heun")
    tilted = reward_guided(normal(m, s), reward, 1.0, below=0.9999)
    close(sample(tilted, x, schedule("linear", 400), method="heun") - plain, c * s**2, 2e-3)
    pair = lambda x, sigma: (0.5 * normal(m, s)(x, sigma), normal(m, s)(x, sigma))
    both = sample(reward_guided(pair, reward, 2.0), x, GRID, guidance=3.0)
    expected = sample(reward_guided(guided(pair, 3.0), reward, 2.0), x, GRID)
    close(both, expected)
    free = torch.tensor([1.0, 0.97, 0.951], dtype=F64)
    close(sample(reward_guided(normal(m, s), reward, 2.0), x, free), sample(normal(m, s), x, free), 1e-15)


def test_refusals():
    x = draw(2, 3, 4)
    with pytest.raises(ValueError, match=r"Keep: pull must be 0 .. 2 \(\|1 - pull\| <= 1\), got 2.5"):
        Keep(x, pull=2.5)
    with pytest.raises(ValueError, match="optimizer must be 'sgd' or 'adam', got 'lion'"):
        Descent(torch.sum, 1.0, optimizer="lion")
    with pytest.raises(ValueError, match="masked_guidance needs Keep with a mask"):
        flow_chef(wild_pair, x, GRID, Keep(x), masked_guidance=2.0)
    with pytest.raises(ValueError, match=r"rows and columns must be \[\*, 3\] and \[\*, 4\], got \[3, 5\]"):
        flow_chef(wild, x, GRID, Separable(x, torch.ones(3, 5), torch.ones(4, 4)))
    with pytest.raises(ValueError, match=r"target must be \[..., 2, 4\], got \[2, 3, 4\]"):
        flow_chef(wild, x, GRID, Separable(x, torch.ones(2, 3), torch.eye(4)))
    with pytest.raises(ValueError, match="below must be at least 0 and below 1, got 1"):
        reward_guided(wild, wild, 1.0, below=1)
