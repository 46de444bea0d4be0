"""Known regions, starts at a level, time travel, windows of long videos, weights of tokens."""

import math
from itertools import pairwise

import pytest
import torch

from rfkernels import editing, ops
from rfkernels.editing import Travel, image_to_image, inpaint, outpaint_weights, travel_coefficients
from rfkernels.ops import noise_keys, philox_normal, renoise
from rfkernels.samplers import sample, schedule
from tests.editing.fields import F64, close, guided, normal, wild, wild_pair
from tests.editing.test_inversion import draw, launches  # noqa: F401

GRID = schedule("shift", 6, shift=2.0)


@pytest.mark.parametrize("strength, steps", [(1.0, 6), (0.5, 3), (0.34, 3), (0.01, 1), (1 / 3, 2)])
def test_start_at_a_strength(strength, steps):
    x = draw(2, 5)
    start = GRID[-1 - steps].item()
    noise = philox_normal(x.shape, noise_keys([4, 7], 2), dtype=F64)
    expected = sample(
        wild_pair, (1 - start) * x + start * noise, GRID[-1 - steps :], method="heun", guidance=2.0
    )
    result = image_to_image(wild_pair, x, GRID, strength=strength, method="heun", guidance=2.0, seeds=[4, 7])
    close(result, expected)


@pytest.mark.parametrize("travel", [None, Travel(2, 2, until=0.5), Travel(3, 1, until=1.0)])
@pytest.mark.parametrize("guidance", [None, torch.tensor([0.5, 3.0])])
def test_inpainting_is_its_equation(travel, guidance):
    x, y = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    mask = torch.tensor([1.0, 0.0, 0.25, 1.0], dtype=F64)
    field = wild if guidance is None else guided(wild_pair, guidance)
    result = inpaint(wild if guidance is None else wild_pair, x, GRID, known=y, mask=mask, travel=travel,
                     guidance=guidance, seeds=[4, 7])  # fmt: skip
    assert torch.equal(result[..., mask == 1], y[..., mask == 1])
    path = travel.path(6) if travel else [(i, i + 1) for i in range(6)]
    for at, (i, to) in enumerate(path):
        a, b, c = GRID[i].item(), GRID[i + 1].item(), GRID[to].item()
        z = philox_normal(x.shape, noise_keys([4, 7], 2, step=at + 1), dtype=F64)
        free = x + (b - a) * field(x, torch.full((2,), a, dtype=F64))
        if c > b:
            k = (1 - c) / (1 - b)
            free = k * free + math.sqrt(c**2 - (k * b) ** 2) * z
        x = mask * ((1 - c) * y + c * z) + (1 - mask) * free
    close(result, x)


def test_a_step_is_one_launch(launches):  # noqa: F811
    x = draw(2, 5)
    travel = Travel(2, 2, until=0.5)
    inpaint(wild_pair, x, GRID, known=x, mask=torch.ones(5), travel=travel, guidance=2.0)
    assert len(launches) == len(travel.path(6)) == 6 + 2 * 2


def test_path_of_time_travel():
    path = Travel(2, 1, until=0.6).path(5)
    assert path == [(0, 1), (1, 0), (0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert Travel(2, 1, until=0.7).path(5)[4:6] == [(2, 3), (3, 2)]
    assert Travel(3, 0).path(4) == [(i, i + 1) for i in range(4)]
    assert max(to for _, to in Travel(4, 3, until=1.0).path(10)) == 10  # ends where it should


def test_travel_keeps_the_marginal():
    """Exact steps, then up again: what arrives has the marginal of the level, N(A m, A^2 s^2 + sigma^2)."""
    assert travel_coefficients(0.6, 0.8) == pytest.approx((0.5, 0.741619849), abs=1e-9)
    m, s, n = 0.7, 0.5, 200000
    x0 = m + s * draw(n, 1)
    x = 0.6 * x0 + 0.4 * draw(n, 1, seed=1)
    up = renoise(x, *travel_coefficients(0.4, 0.8), noise_keys(3, n))
    close(up.mean(), 0.2 * m, 4 * 0.81 / n**0.5)
    close(up.std(), math.hypot(0.2 * s, 0.8), 4 * 0.81 / (2 * n) ** 0.5)
    down = sample(normal(m, s), up, torch.linspace(0.8, 0.4, 30, dtype=F64), method="heun")
    close(down.std(), math.hypot(0.6 * s, 0.4), 4 * 0.5 / (2 * n) ** 0.5)
    assert torch.corrcoef(torch.cat([up, x], 1).T)[0, 1] > 0.2
    with pytest.raises(ValueError, match=r"got 0\.8 to 0\.6"):
        travel_coefficients(0.8, 0.6)
    assert travel_coefficients(0.3, 1.0) == (0, 1) and travel_coefficients(0.3, 0.3) == (1, 0)


def test_noise_of_the_known_part_is_fresh_and_per_sample():
    x, seen = torch.zeros(2, 400, dtype=F64), []
    still = lambda x, s: seen.append(x.clone()) or torch.zeros_like(x)
    both = inpaint(still, x, GRID, known=x, mask=torch.ones(400), seeds=[5, 6])
    for a, b in pairwise(seen[1:]):
        assert abs(torch.corrcoef(torch.stack([a[0], b[0]]))[0, 1]) < 0.2
    close(seen[2].std(), GRID[2], 0.05)
    assert torch.equal(both, x)
    second = seen[3][1:].clone()
    seen.clear()
    inpaint(still, x[1:], GRID, known=x[1:], mask=torch.ones(400), seeds=[6])
    assert torch.equal(seen[3], second)


def test_windows_of_a_video_are_averaged():
    x = draw(2, 3, 11, 2, 2)
    pointwise = lambda x, s: wild_pair(x, s)
    u, c = editing.window_average(pointwise, 4, 3)(x, torch.tensor([0.3, 0.6], dtype=F64))
    expected = wild_pair(x, torch.tensor([0.3, 0.6], dtype=F64))
    close(u, expected[0])
    close(c, expected[1])
    index = lambda x, s: torch.arange(x.shape[2], dtype=F64).view(1, 1, -1, 1, 1).expand(x.shape)
    mean = editing.window_average(index, 4, 2)(torch.zeros(1, 1, 7, 1, 1, dtype=F64), torch.ones(1))
    # windows from 0, 2, 3
    close(mean.flatten(), [0, 1, (2 + 0) / 2, (3 + 1 + 0) / 3, (2 + 1) / 2, (3 + 2) / 2, 3], 1e-7)
    rows = torch.rand(2, 1, 11, dtype=F64)
    per_frame = lambda x, s: x * s.view(2, 1, -1, 1, 1)
    close(editing.window_average(per_frame, 4, 3)(x, rows), x * rows[..., None, None], 1e-7)
    assert editing.window_average(wild, 11, 4)(x, rows[:, 0, 0]).shape == x.shape


def test_windows_cut_and_join():
    assert editing.window_starts(100, 32, 8) == [*range(0, 65, 8), 68]
    assert editing.window_starts(96, 32, 8) == list(range(0, 65, 8))
    for length, size, stride in ((100, 32, 8), (96, 32, 8), (7, 3, 3), (5, 5, 2)):
        x, starts = draw(2, 3, length), editing.window_starts(length, size, stride)
        windows = editing.cut_windows(x, size, starts)
        assert windows.shape == (2, len(starts), 3, size)
        assert torch.equal(editing.join_windows(windows, starts), x)
    with pytest.raises(ValueError, match="1 <= stride <= size <= length is required, got 2, 8, 5"):
        editing.window_starts(5, 8, 2)


def test_weights_of_tokens():
    weights = outpaint_weights(6, 8, (2, 2, 4, 5)).view(6, 8)
    assert (weights[2:4, 2:5] == 1).all() and weights.dtype == torch.float32
    close(weights[2, 7], math.exp(-3 / 3), 1e-6)
    close(weights[0, 0], math.exp(-math.hypot(2, 2) / 3), 1e-6)
    close(outpaint_weights(6, 8, (2, 2, 4, 5), k=2.0), weights.flatten().sqrt(), 1e-6)
    assert (outpaint_weights(6, 8, (0, 0, 6, 8)) == 1).all()
    with pytest.raises(ValueError, match="known must be a box in 6 x 8"):
        outpaint_weights(6, 8, (2, 2, 2, 5))
    with pytest.raises(ValueError, match="k must be positive"):
        outpaint_weights(6, 8, (2, 2, 4, 5), k=0)


def test_weights_scale_a_branch_by_token():
    """1 everywhere is the ordinary LoRA; 0 the layer without it."""
    g = torch.Generator().manual_seed(0)
    x, base, down, up = (torch.randn(*s, generator=g) for s in ((2, 48, 16), (8, 16), (4, 16), (8, 4)))
    scale = torch.full((4,), 0.5)
    run = lambda w: ops.linear(x, base, lora=(ops.lora_shrink(x, down, w[:, None] * scale), up))
    plain, adapted = x @ base.T, x @ base.T + 0.5 * x @ down.T @ up.T
    weights = outpaint_weights(6, 8, (2, 2, 4, 5))
    close(run(outpaint_weights(6, 8, (0, 0, 6, 8))), adapted, 1e-4)
    close(run(weights), plain + weights[:, None] * (adapted - plain), 1e-4)


def test_refusals():
    x = draw(2, 5)
    with pytest.raises(ValueError, match="strength must be above 0 and at most 1, got 0"):
        image_to_image(wild, x, GRID, strength=0)
    with pytest.raises(ValueError, match=r"mask must broadcast to x \[2, 5\], got \[4\]"):
        inpaint(wild, x, GRID, known=x, mask=torch.ones(4))
    with pytest.raises(ValueError, match="jump >= 1 and repeat >= 0 are required, got 0, 1"):
        Travel(0, 1)
