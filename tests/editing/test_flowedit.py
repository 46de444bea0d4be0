"""FlowEdit: what leaves a picture alone, exact recursions, golden points, and what was built on it."""

import math
from itertools import pairwise

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from rfkernels.editing import flow_edit, pair_velocity, pyramid_jump, sinkhorn
from rfkernels.editing import flowedit as module
from rfkernels.ops import noise_keys, philox_normal
from rfkernels.samplers import sample, schedule
from tests.editing.fields import F64, SIGMA, X, Y, Z, close, column, wild, wild_pair
from tests.editing.test_inversion import draw

GRID = schedule("shift", 6, shift=3.0)


def same(x, sigma):
    return wild(x, sigma)


@pytest.fixture
def launches(monkeypatch):
    calls, real = [], module.combine
    noted = lambda *a, **k: calls.append(1) or real(*a, **k)
    monkeypatch.setattr(module, "combine", noted)
    monkeypatch.setattr("rfkernels.editing._launches.combine", noted)
    return calls


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method, n_avg, strength", [
    ("euler", 1, None), ("ab2", 2, None), ("euler", 3, 0.6), ("unipc", 1, None), ("heun", 2, 0.6),
])  # fmt: skip
def test_one_prompt_leaves_the_picture_to_the_bit(dtype, method, n_avg, strength):
    x = draw(2, 3, 4).to(dtype)
    velocity = lambda z, s: tuple(v.to(dtype) for v in wild_pair(z.double(), s.double()))
    result = flow_edit(
        velocity, x, GRID, n_max=5, n_avg=n_avg, method=method, strength=strength,
        source_guidance=torch.tensor([3.5, 1.1]), target_guidance=torch.tensor([3.5, 1.1]),
    )  # fmt: skip
    assert torch.equal(result, x)


def test_points_share_their_noise_to_the_bit():
    x, seen = draw(2, 50).float(), []
    flow_edit(lambda z, s: seen.append(z.clone()) or torch.zeros_like(z), x, GRID, seeds=[3, 9], n_avg=2)
    for at, z in enumerate(seen):
        sigma = GRID[at // 2].item()
        assert torch.equal(z[:2], z[2:])
        noise = philox_normal(x.shape, noise_keys([3, 9], 2, step=at + 1), dtype=torch.float32)
        close(z[:2], (1 - sigma) * x + sigma * noise, 1e-6)


def test_golden_points():
    launch = module.Launches(Y[None], ["x", "d", "n"], [[
        {"x": 1 - SIGMA, "n": SIGMA}, {"x": 1 - SIGMA, "d": 1.0, "n": SIGMA}]])  # fmt: skip
    z_src, z_tar = launch(0, [Y[None], (X - Y)[None], Z[None]])
    source = [0.600000000, -0.412136013, 0.424741673, -0.602561257, 0.704184025, -0.564616970, 0.288875441,
              -0.130516085]  # fmt: skip
    target = [1.441470985, 0.042512701, 0.944262929, -1.219656003, -0.749419373, -0.572021913, 1.214148499,
              0.363538484]  # fmt: skip
    close(z_src[0], source, 2e-9)
    close(z_tar[0], target, 2e-9)
    prepare = module._Prepare(Y[None], [SIGMA], 1, 4)
    noise = philox_normal((1, 8), noise_keys(4, 1, step=1), dtype=F64)
    close(prepare(0, Y[None], (X - Y)[None]) - SIGMA * noise, torch.stack([0.4 * Y, X - Y + 0.4 * Y]))


@pytest.mark.parametrize("method", ["euler", "ab2", "heun", "unipc"])
@pytest.mark.parametrize("n_avg", [1, 3])
def test_a_constant_difference_moves_by_it(method, n_avg):
    """x + k (sigma_end - sigma_start), whatever the noise."""
    x, k = draw(2, 5), draw(5, seed=3)
    velocity = pair_velocity(wild, lambda z, s: wild(z, s) + k)
    flat = lambda z, s: torch.cat([torch.zeros(2, 5, dtype=F64), k.expand(2, 5)])
    for seeds in (0, 7):
        close(flow_edit(flat, x, GRID, n_max=4, n_avg=n_avg, method=method, seeds=seeds), x - k * GRID[2])
    assert not torch.allclose(flow_edit(velocity, x, GRID, n_max=4), x - k * GRID[2])  # points part


def linear(z, sigma):
    """v_tar - v_src = B (z_tar - z_src) + c, the noise cancels."""
    b, c = 0.7 * column(sigma, z), torch.tensor([0.3, -0.2, 1.0], dtype=F64)
    return torch.cat([b[:2] * z[:2], b[2:] * z[2:] + c])


@pytest.mark.parametrize("w", [(None, None), (2.0, 4.0), (torch.tensor([1.0, 3.0]), 2.0)])
def test_linear_fields_give_an_affine_recursion(w):
    x = draw(2, 3)
    as_column = lambda t: t[:, None].double() if isinstance(t, torch.Tensor) else t

    def pair(z, sigma):
        v = linear(z, sigma)
        return 0.5 * v, v

    guided = w[0] is not None
    velocity = pair if guided else linear
    result = flow_edit(velocity, x, GRID, n_max=5, source_guidance=w[0], target_guidance=w[1], n_avg=2)
    scale = [0.5 + 0.5 * as_column(s) if guided else 1.0 for s in w]
    if guided and w[0] is not w[1]:
        return _affine_with_noise(result, x, scale)
    d, c = torch.zeros(2, 3, dtype=F64), torch.tensor([0.3, -0.2, 1.0], dtype=F64)
    for a, b in pairwise(GRID[1:].tolist()):
        d = d + (b - a) * scale[1] * (0.7 * a * d + c)
    close(result, x + d)


def _affine_with_noise(result, x, scale):
    """Two scales of guidance: the noise of the definition, drawn again."""
    d, c = torch.zeros(2, 3, dtype=F64), torch.tensor([0.3, -0.2, 1.0], dtype=F64)
    for i, (a, b) in enumerate(pairwise(GRID[1:].tolist())):
        change = 0
        for k in range(2):
            noise = philox_normal(x.shape, noise_keys(0, 2, step=2 * i + k + 1), dtype=F64)
            source = (1 - a) * x + a * noise
            target = d + source
            change = change + (scale[1] * (0.7 * a * target + c) - scale[0] * 0.7 * a * source) / 2
        d = d + (b - a) * change
    close(result, x + d)


@pytest.mark.parametrize("n_avg", [1, 3])
def test_multistep_history_is_of_the_difference(n_avg):
    x, flat = draw(2, 3), []

    def velocity(z, sigma):
        flat.append(sigma[0].item() ** 2)
        return torch.cat([torch.zeros(2, 3, dtype=F64), torch.full((2, 3), flat[-1], dtype=F64)])

    result = flow_edit(velocity, x, GRID, method="ab2", n_avg=n_avg)
    d, last, before = 0.0, None, None
    for a, b in pairwise(GRID.tolist()):
        h, v = b - a, a**2
        half = h / before / 2 if before else 0
        d, last, before = d + h * ((1 + half) * v - half * (last or 0)), v, h
    close(result, x + d)
    assert abs(d + 1 / 3) < abs(sum((b - a) * a**2 for a, b in pairwise(GRID.tolist())) + 1 / 3) / 2


@pytest.mark.parametrize("method", ["unipc", "dpmpp_2m", "midpoint"])
@pytest.mark.parametrize("w", [None, 3.0])
def test_any_method_solves_the_equation_of_the_edit(method, w):
    """Without noise in the difference it is `sample` of dd/dsigma = v_tar(d) from 0."""
    x = draw(2, 3)

    def velocity(z, sigma):
        d = z[2:] - z[:2]
        v = torch.cat([torch.zeros_like(d), torch.cos(2 * d) + column(sigma[2:], d)])
        return v if w is None else (0 * v, v / w)

    result = flow_edit(
        velocity, x, GRID, n_max=5, method=method, source_guidance=w, target_guidance=w, n_avg=2
    )
    field = lambda d, s: torch.cos(2 * d) + column(s, d)
    close(result - x, sample(field, torch.zeros_like(x), GRID[1:], method=method), 1e-12)


def test_the_tail_samples_the_target():
    x = draw(2, 3)
    steps = []

    def target(z, sigma):
        steps.append(sigma[0].item())
        return 0.5 * z, wild(z, sigma)

    pair = lambda z, s: (torch.zeros_like(z), torch.zeros_like(z))
    result = flow_edit(pair, x, GRID, n_max=4, n_min=2, target=target, source_guidance=1.0,
                       target_guidance=3.0, seeds=[1, 2])  # fmt: skip
    close(torch.tensor(steps, dtype=F64), GRID[4:6])
    s = GRID[4].item()
    z = (1 - s) * x + s * philox_normal(x.shape, noise_keys([1, 2], 2, step=2**31), dtype=F64)
    for a, b in pairwise(GRID[4:].tolist()):
        v = -2 * 0.5 * z + 3 * wild(z, torch.full((2,), a, dtype=F64))
        z = z + (b - a) * v
    close(result, z)


def test_strength_scales_the_difference():
    x = draw(2, 3)
    flat = lambda z, s: torch.cat([torch.zeros_like(z[:2]), torch.ones_like(z[:2])])
    close(flow_edit(flat, x, GRID, strength=0.6), x - 0.6)


def test_coupling_factor():
    """strength (1 - sigma) K^-1/2 while d is 0; finite and between the bounds of entropy far away."""
    x = draw(2, 600)
    points = [module._Prepare(x, [0.9], 1, 5 + k)(0, x, torch.zeros_like(x)) for k in range(4)]
    sigma = torch.full((2,), 0.9, dtype=F64)
    close(module._factor(points, sigma, 0.6, 0.01), 0.6 * 0.1 * 4**-0.5, 1e-9)
    far = [module._Prepare(x, [0.9], 1, 5 + k)(0, x, torch.full_like(x, 30.0)) for k in range(4)]
    factor = module._factor([t.float() for t in far], sigma, 0.6, 0.1)
    assert (factor >= 0.06 / 4 - 1e-9).all() and (factor <= 0.06 / 2 + 1e-9).all()
    flat = lambda z, s: torch.cat([torch.zeros_like(z[:2]), torch.ones_like(z[:2])])
    moved = flow_edit(flat, x, GRID, strength=0.6, n_avg=4, reg=1e-3) - x
    expected = sum(
        h * 0.6 * (1 - s) / 2 for s, h in zip(GRID[:-1].tolist(), GRID.diff().tolist(), strict=True)
    )
    close(moved[:, 0], expected, 1e-3)


def test_sinkhorn_marginals_and_limits():
    cost = draw(3, 5, 5).square() * 1e6  # exp(-cost / reg) underflows
    p = sinkhorn(cost, 1e5, 2000).exp()
    close(p.sum(-1), 0.2, 1e-6)
    close(p.sum(-2), 0.2, 1e-6)
    p = sinkhorn(cost[0], 2e3, 5000).exp()
    rows, columns = linear_sum_assignment(cost[0])
    close(p[rows, columns], 0.2, 1e-3)
    with pytest.raises(ValueError, match="reg must be positive, got 0"):
        sinkhorn(cost, 0)


def test_wan_edit_noises_at_the_step_before():
    x, seen = draw(1, 4000), []
    velocity = lambda z, s: seen.append((z[:1].std().item(), s[0].item())) or torch.zeros_like(z)
    flow_edit(velocity, 0 * x, GRID, n_max=5, compat="wan-edit")
    for (std, told), before, now in zip(seen, GRID.tolist(), GRID[1:].tolist(), strict=False):
        assert told == now and abs(std - before) < 0.05


@pytest.mark.parametrize("w", [None, 3.0])
@pytest.mark.parametrize("method", ["euler", "ab2"])
def test_two_launches_an_evaluation(launches, w, method):
    x = draw(2, 3)
    velocity = (lambda z, s: (z, z)) if w else (lambda z, s: z)
    flow_edit(velocity, x, GRID, n_max=4, n_avg=2, source_guidance=w, target_guidance=w, method=method)
    assert len(launches) == 2 * 4 * 2


def test_draws_differ_and_samples_stand_alone():
    x, seen = draw(2, 40), []
    both = flow_edit(lambda z, s: seen.append(z[0].clone()) or z.sin(), x, GRID, n_avg=3, seeds=[5, 6])
    assert len({tuple(z.tolist()) for z in seen}) == len(seen)
    alone = flow_edit(lambda z, s: z.sin(), x[1:], GRID, n_avg=3, seeds=[6])
    assert torch.equal(both[1:], alone)


@pytest.mark.parametrize("sigma, end", [(0.5, None), (0.3, 0.8), (0.0, 0.4), (0.6, 1.0)])
def test_a_jump_keeps_the_noise_white(sigma, end):
    """Covariance within blocks of the noise of a state at the new level: sigma'^2 I."""
    n = 60000
    low = sigma * draw(n, 1, 1)
    x, level = pyramid_jump(low, sigma, end=end, seeds=3)
    assert x.shape == (n, 2, 2) and level == pytest.approx(end or 2 * sigma / (1 + sigma))
    covariance = torch.cov(x.flatten(1).T)
    close(covariance, level**2 * torch.eye(4, dtype=F64), 6 * level**2 / n**0.5)


def test_a_jump_keeps_the_signal_and_its_noise_is_the_published_one():
    x = draw(1, 3, 2, 4)
    big, level = pyramid_jump(x, 0.5, seeds=1)
    signal = (1 - level) / 0.5 * x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    noise = big - signal
    assert noise.std() > 0.1
    close(noise.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean((-1, -3)), 0.0)  # gamma = -1/3
    b2 = level**2 - ((1 - level) / 0.5 * 0.5) ** 2
    assert b2 == pytest.approx(3 * (0.5 / 1.5) ** 2)
    with pytest.raises(ValueError, match=r"2 sigma / \(1 \+ sigma\) <= end <= 1 are required, got 0.5, 0.6"):
        pyramid_jump(x, 0.5, end=0.6)


def test_refusals():
    x = draw(2, 3)
    with pytest.raises(ValueError, match="n_min <= n_max <= 6 steps is required, got 0, 7"):
        flow_edit(wild, x, GRID, n_max=7)
    with pytest.raises(ValueError, match="go together"):
        flow_edit(wild, x, GRID, source_guidance=3.0)
    with pytest.raises(ValueError, match="n_min 2 needs target="):
        flow_edit(wild, x, GRID, n_min=2)
    with pytest.raises(ValueError, match=r"method must be one of euler, .*, got 'rk9'"):
        flow_edit(wild, x, GRID, method="rk9")
    for method in ("dopri5", "dpmpp_2m_sde"):
        with pytest.raises(ValueError, match=f"must have a grid and draw no noise, got '{method}'"):
            flow_edit(wild, x, GRID, method=method)
    with pytest.raises(ValueError, match="n_avg must be at least 1, got 0"):
        flow_edit(wild, x, GRID, n_avg=0)
    with pytest.raises(ValueError, match=r"shape of x \[4, 3\], got \[2, 3\]"):
        flow_edit(lambda z, s: z[:2], x, GRID)
    assert math.isfinite(flow_edit(wild, x, GRID).sum())
