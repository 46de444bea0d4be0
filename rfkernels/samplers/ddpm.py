r"""The noise levels of DDPM-like models on the rectified-flow path.

A state :math:`x = \alpha x_0 + \sigma\epsilon` divided by :math:`\alpha + \sigma` lies on the straight path
at level :math:`s = \sigma/(\alpha + \sigma)`, and DDIM's step there is Euler's. So a model that predicts the
noise, such as those of Rectified Diffusion (Wang et al., 2024), is sampled by any method along these levels.
"""

import torch
from torch import Tensor

from rfkernels.samplers.schedules import _ended, _require, _whole

__all__ = ["BETAS", "ddpm_levels", "ddpm_path", "ddpm_timesteps"]

BETAS = ("linear", "scaled_linear")


def ddpm_path(
    betas: str = "scaled_linear",
    *,
    train_timesteps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
) -> tuple[Tensor, Tensor]:
    r"""Returns alpha and sigma, `[train_timesteps]`, with :math:`\alpha_t^2 = \prod_{j\le t}(1 - \beta_j)`.

    float64. `linear` betas are uniform, `scaled_linear` ones squares of uniform numbers: Stable Diffusion's.
    Rectified Diffusion trains and samples with `linear` (:math:`\alpha_T^2` = .00158 instead of .00466), its
    phased models with `scaled_linear`: the two are easily mixed up.
    """
    _require(betas in BETAS, f"betas must be one of {', '.join(BETAS)}, got {betas!r}")
    _whole("train_timesteps", train_timesteps)
    good = 0 < beta_start <= beta_end < 1
    _require(good, f"required 0 < beta_start <= beta_end < 1, got {beta_start}, {beta_end}")
    power = 1 if betas == "linear" else 2
    ends = beta_start ** (1 / power), beta_end ** (1 / power)
    beta = torch.linspace(*ends, train_timesteps, dtype=torch.float64) ** power
    kept = (1 - beta).cumprod(0)
    return kept.sqrt(), (1 - kept).sqrt()


def ddpm_timesteps(steps: int, train_timesteps: int = 1000) -> Tensor:
    """int64 `[steps]`, falling from `train_timesteps - 1`: diffusers' "trailing" spacing."""
    _whole("steps", steps)
    _whole("train_timesteps", train_timesteps)
    _require(steps <= train_timesteps, f"steps must be at most {train_timesteps}, got {steps}")
    spaced = torch.arange(steps, dtype=torch.float64) * (train_timesteps / steps)
    return (train_timesteps - spaced).round().long() - 1


def ddpm_levels(
    steps: int, path: str | tuple[Tensor, Tensor] = "scaled_linear"
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Returns the levels s `[steps + 1]`, down to 0, and for each step its timestep and scale, `[steps]`.

    The scale is :math:`\alpha + \sigma`. Sample z = x / scale along the levels: noise x starts as x /
    scales[0]. At a level the model sees x = scale z and the timestep, predicts e, and the velocity of z is
    :math:`v = (e - z)/(1 - s)`; the end is the data itself. `path` is the betas, or what `ddpm_path`
    returns.
    """
    alpha, sigma = ddpm_path(path) if isinstance(path, str) else path
    timesteps = ddpm_timesteps(steps, len(alpha))
    scales = (alpha + sigma)[timesteps]
    return _ended(sigma[timesteps] / scales), timesteps, scales
