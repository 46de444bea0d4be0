"""Videos with a noise level for each frame: what stays, what is equal, and conditioning that is exact."""

import pytest
import torch

from rfkernels.editing import (
    extend_video,
    extension,
    frame_levels,
    image_to_video,
    pusa_start,
    sample_video,
    start_end,
)
from rfkernels.ops import noise_keys, philox_normal
from rfkernels.samplers import sample, schedule
from tests.editing.fields import F64, close, column
from tests.editing.test_inversion import draw

GRID = schedule("shift", 6, shift=5.0)
FRAMES = 5


def rows(sigma, x):
    """A level for each frame, [*, 1, frames, 1, 1]."""
    return sigma.expand(sigma.shape[0], 1, x.shape[2])[..., None, None]


def mixing(x, sigma):
    """No flow in particular, that mixes frames and reads their levels."""
    return torch.sin(2 * x + x.flip(2)) + rows(sigma, x) * x.roll(1, 3)


def gaussian(covariance):
    """The exact velocity of videos whose pixels are normal, with this covariance between frames."""
    frames = len(covariance)

    def velocity(x, sigma):
        s = sigma.reshape(-1, frames)[0].to(x.dtype)
        a = 1 - s
        total = a[:, None] * covariance.to(x.dtype) * a + torch.diag(s**2)
        solved = torch.linalg.solve(total, x.movedim(2, 0).flatten(1))
        v = (torch.diag(s) - covariance.to(x.dtype) * a) @ solved
        return v.view(frames, *x.movedim(2, 0).shape[1:]).movedim(0, 2)

    return velocity


def brownian(frames):
    t = torch.arange(1, frames + 1, dtype=F64)
    return torch.minimum(t[:, None], t) / frames + 0.05


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_without_known_frames_it_is_euler_to_the_bit(dtype):
    noise = draw(2, 3, FRAMES, 4, 4).to(dtype)
    expected = sample(lambda x, s: mixing(x, s[:, None, None]), noise, GRID)
    assert torch.equal(sample_video(mixing, noise, GRID), expected)
    full = sample_video(mixing, noise, GRID, video=torch.zeros_like(noise), known={1: 1.0})
    assert torch.equal(full, expected)


@pytest.mark.parametrize("method", ["euler", "heun", "ab2", "rk4", "unipc", "dpmpp_2m", "euler_sde"])
@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_frozen_frames_never_change(method, guidance, dtype):
    noise, video = draw(2, 3, FRAMES, 4, 4).to(dtype), draw(2, 3, FRAMES, 4, 4, seed=1).to(dtype)
    video[:, :, 1] = float("nan")  # not known: not read
    seen = []

    def velocity(x, sigma):
        seen.append(x.clone())
        v = mixing(x, sigma)
        return v if guidance is None else (0.5 * v, v)

    known = {0: 0.0, 3: 0.0, 4: 0.4}
    result = sample_video(
        velocity, noise, GRID, video=video, known=known, method=method, guidance=guidance, seeds=1
    )
    for x in (*seen, result):
        assert torch.equal(x[:, :, 0], video[:, :, 0]) and torch.equal(x[:, :, 3], video[:, :, 3])
    assert result.isfinite().all() and not torch.equal(result[:, :, 4], video[:, :, 4])


def test_levels_that_the_model_sees():
    seen = []
    velocity = lambda x, sigma: seen.append(sigma.clone()) or x
    noise = draw(2, 3, FRAMES, 4, 4)
    sample_video(velocity, noise, GRID, video=noise, known=start_end(FRAMES))
    m = torch.tensor([0.2, 1, 1, 1, 0.5], dtype=F64)
    for i, sigma in enumerate(seen):
        close(sigma.reshape(-1, FRAMES)[0], GRID[i] * m)
    m = torch.tensor([0.2, 1, 1, 1, 1], dtype=F64)
    close(frame_levels(GRID, FRAMES, image_to_video())[:, 0, 0], GRID[:, None] * m)
    assert extension() == {0: 0.0, 1: 0.3, 2: 0.4, 3: 0.5}
    assert start_end(21) == {0: 0.2, 20: 0.5}


def test_scaled_levels_stay_on_the_path():
    """From (1 - m) z + m eps, with the exact velocity of data that are z: the end is z."""
    z, noise = draw(1, 2, FRAMES, 3, 3), draw(1, 2, FRAMES, 3, 3, seed=1)
    dirac = lambda x, sigma: (x - z) / rows(sigma, x).clamp(min=1e-300)
    known = {0: 0.2, 2: 0.7, 3: 0.0}
    close(sample_video(dirac, noise, GRID, video=z, known=known), z, 1e-13)
    start = pusa_start(noise, z, known)
    close(start[:, :, 2], 0.3 * z[:, :, 2] + 0.7 * noise[:, :, 2])
    assert torch.equal(start[:, :, 1], noise[:, :, 1]) and torch.equal(start[:, :, 3], z[:, :, 3])
    half = pusa_start(noise, z, known, level=0.5)  # of a grid from .5
    close(half[:, :, 2], 0.65 * z[:, :, 2] + 0.35 * noise[:, :, 2])
    assert torch.equal(half[:, :, 1], noise[:, :, 1])


def test_frames_that_do_not_mix_run_alone():
    noise, video = draw(2, 3, FRAMES, 4, 4), draw(2, 3, FRAMES, 4, 4, seed=1)
    alone = lambda x, s: torch.sin(3 * x) + column(s, x) * x
    together = lambda x, sigma: torch.sin(3 * x) + rows(sigma, x) * x
    result = sample_video(together, noise, GRID, video=video, known={1: 0.6})
    frame = 0.4 * video[:, :, 1] + 0.6 * noise[:, :, 1]
    close(result[:, :, 1], sample(alone, frame, 0.6 * GRID))


def test_a_kept_frame_conditions_the_others():
    """Generated frames given the first have the conditional mean and variance of the data."""
    k = brownian(FRAMES)
    pixels = 120
    first = draw(1, 1, 1, pixels, pixels, seed=2) * k[0, 0].sqrt()
    noise = draw(1, 1, FRAMES, pixels, pixels)
    grid = schedule("linear", 40)
    x = sample_video(gaussian(k), noise, grid, video=first, known=image_to_video(0.0), method="heun")
    frames = x[0, 0].flatten(1)
    slope = (frames[1:] @ frames[0]) / (frames[0] @ frames[0])
    close(slope, k[1:, 0] / k[0, 0], 0.06)
    left = frames[1:] - k[1:, 0:1] / k[0, 0] * frames[0]
    close(left @ left.T / pixels**2, k[1:, 1:] - k[1:, :1] * k[:1, 1:] / k[0, 0], 0.04)


def test_a_video_is_extended_window_by_window():
    k, calls = brownian(FRAMES), []
    velocity = lambda x, s: calls.append(s.reshape(-1, FRAMES)[0].tolist()) or gaussian(k)(x, s)
    video = draw(2, 1, 3, 4, 4)
    longer = extend_video(velocity, video, GRID, frames=FRAMES, total=8, m=(0.0, 0.3), seeds=[4, 5])
    assert longer.shape == (2, 1, 8, 4, 4) and torch.equal(longer[:, :, :3], video)
    assert len(calls) == 2 * 6 and calls[0][:2] == [0.0, pytest.approx(0.3)]
    again = extend_video(velocity, video[1:], GRID, frames=FRAMES, total=6, m=(0.0, 0.3), seeds=[5])
    close(again, longer[1:, :, :6])
    still = extend_video(lambda x, s: 0 * x, video, GRID, frames=FRAMES, total=9, m=(0.0, 0.0), seeds=3)
    keys = [noise_keys(3, 2, step=window) for window in (0, 1)]
    drawn = [philox_normal((2, 1, FRAMES, 4, 4), k, dtype=F64)[:, :, 2:] for k in keys]
    close(still[:, :, 3:], torch.cat(drawn, 2))
    assert longer.std() < 2 and not torch.equal(longer[:, :, 3], longer[:, :, 6])


def test_refusals():
    noise = draw(1, 1, FRAMES, 2, 2)
    with pytest.raises(ValueError, match=r"known frames must be 0 \.\. 4, got 5"):
        sample_video(mixing, noise, GRID, video=noise, known={5: 0.0})
    with pytest.raises(ValueError, match=r"must be 0 \.\. 1, got 1\.5 for frame 0"):
        sample_video(mixing, noise, GRID, video=noise, known={0: 1.5})
    with pytest.raises(ValueError, match="go together"):
        sample_video(mixing, noise, GRID, video=noise)
    with pytest.raises(ValueError, match="1 to 4 frames to go on from are required, got 5"):
        extend_video(mixing, noise, GRID, frames=5, total=9, m=(0.0,) * 5)
    with pytest.raises(ValueError, match=r"\[batch, channels, frames, height, width\], got \[1, 5\]"):
        sample_video(mixing, draw(1, 5), GRID)
