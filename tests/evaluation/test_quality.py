import numpy as np
import pytest
import torch

from rfkernels.evaluation import quality


def pictures(seed: int = 0, size: int = 14) -> torch.Tensor:
    return torch.rand(2, 4, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_is_its_definition():
    a, b = pictures(0), pictures(1)
    error = ((a.double() - b.double()) / 2).square().mean((1, 2, 3))
    torch.testing.assert_close(quality.psnr(a, b), 10 * torch.log10(1 / error))
    assert quality.psnr(a, a).tolist() == [100, 100]
    assert quality.psnr(a * 0 + 1, a * 0 - 1).tolist() == [0, 0]


def test_ssim_is_its_definition():
    a, b = pictures(0), (pictures(0) + 0.5 * pictures(1)).clamp(-1, 1)
    at = np.arange(11) - 5
    weights = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    weights /= weights.sum()
    x, y = ((t.double().numpy() + 1) / 2 for t in (a, b))
    values = np.zeros((2, 4, 4, 4))
    for n, c, i, j in np.ndindex(values.shape):
        p, q = x[n, c, i : i + 11, j : j + 11], y[n, c, i : i + 11, j : j + 11]
        mp, mq = (weights * p).sum(), (weights * q).sum()
        vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
        both = (weights * (p - mp) * (q - mq)).sum()
        values[n, c, i, j] = (
            (2 * mp * mq + 1e-4) * (2 * both + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4))
        )
    expected = torch.from_numpy(values.mean((1, 2, 3)))
    torch.testing.assert_close(quality.ssim(a, b), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(quality.ssim(a, a), torch.ones(2, dtype=torch.float64))


def test_sharpness_falls_with_blur_and_is_that_of_an_edge():
    x = torch.full((1, 4, 16, 16), -1.0)
    x[..., 8:] = 1
    assert quality.sharpness(x).item() == pytest.approx(2 / 15)  # 4 channels step by 1 in one column of 15
    soft = torch.nn.functional.avg_pool2d(pictures(), 3, 1, 1)
    assert (quality.sharpness(soft) < 0.7 * quality.sharpness(pictures())).all()


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        quality.psnr(pictures(), pictures()[:1])
    with pytest.raises(ValueError, match="11 pixels"):
        quality.ssim(pictures(size=10), pictures(size=10))
