"""How near two pictures are (PSNR, SSIM) and how sharp one is, each by its definition in float64.

Pictures are [batch, channels, height, width] in [-1, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["psnr", "sharpness", "ssim"]

WINDOW, SPREAD = 11, 1.5  # of SSIM's Gaussian, pixels


def _both(a: Tensor, b: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(
            f"{name}: two batches [batch, channels, height, width] of one shape were required, got "
            f"{list(a.shape)} and {list(b.shape)}"
        )
    return _unit(a), _unit(b)


def _unit(pictures: Tensor) -> Tensor:
    return (pictures.detach().double().cpu().clamp(-1, 1) + 1) / 2


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """float64[batch]: -10 log10 of the mean square difference of pictures in 0 .. 1; at most 100 dB."""
    a, b = _both(a, b, "psnr")
    return -10 * (a - b).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    r"""float64[batch]: structural similarity, the mean over channels and places of

        (2 m_a m_b + c1) (2 s_ab + c2) / ((m_a^2 + m_b^2 + c1) (s_a^2 + s_b^2 + c2))

    with means, variances and covariance under a Gaussian of 11 x 11 pixels and 1.5 pixels' deviation that
    lies inside the picture, c1 = 0.01^2, c2 = 0.03^2, pictures in 0 .. 1. Wang, Bovik, Sheikh and Simoncelli,
    "Image quality assessment", 2004.
    """
    a, b = _both(a, b, "ssim")
    if min(a.shape[2:]) < WINDOW:
        raise ValueError(f"ssim: pictures of at least {WINDOW} pixels a side required, got {list(a.shape)}")
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    both = _blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (light * (2 * both + c2) / (var_a + var_b + c2)).mean((1, 2, 3))


def _blur(x: Tensor) -> Tensor:
    """The Gaussian means of every whole window."""
    at = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    kernel = (-0.5 * (at / SPREAD) ** 2).exp()
    kernel = kernel / kernel.sum()
    planes = x.flatten(0, 1)[:, None]
    planes = F.conv2d(F.conv2d(planes, kernel[None, None, None]), kernel[None, None, :, None])
    return planes.unflatten(0, x.shape[:2])[:, :, 0]


def sharpness(pictures: Tensor) -> Tensor:
    """float64[batch]: mean length of the gradient of RGBA in 0 .. 1, by differences of neighbours."""
    x = _unit(pictures)
    down, right = x[..., 1:, :-1] - x[..., :-1, :-1], x[..., :-1, 1:] - x[..., :-1, :-1]
    return (down.square() + right.square()).sum(1).sqrt().mean((1, 2))
