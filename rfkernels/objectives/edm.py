r"""Starting a rectified flow from a pretrained EDM denoiser.

:math:`x_\sigma = (1-\sigma)x_0 + \sigma\epsilon` over :math:`1-\sigma` is what EDM (Karras et al., 2022)
denoises, at its noise level :math:`\sigma/(1-\sigma)`, so the denoiser has the velocity in it. Lee, Lin and
Fanti, 2024.
"""

from collections.abc import Callable

from torch import Tensor

from rfkernels.objectives.losses import batch_level
from rfkernels.ops._register import accumulator
from rfkernels.ops.solver import linear_combination
from rfkernels.ops.stochastic import stack_rows

__all__ = ["edm_denoiser", "edm_velocity"]

_EDGE = 1e-5

Denoiser = Callable[[Tensor, Tensor], Tensor]


def edm_velocity(denoiser: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
    r"""Returns :math:`v = (x - D(x/(1-\sigma), \sigma/(1-\sigma)))/\sigma`.

    Both ends are 0/0 or infinite; sigma is kept in 1e-5 .. 1 - 1e-5. The rescaled state reaches 1e5 |x|, so a
    16-bit state is rescaled in float32, which the denoiser then gets.

    Args:
        denoiser: takes the state and EDM's noise level `[batch]`, returns the data estimate.
        x: `[batch, ...]`.
        sigma: `[batch]`, float64 or float32.
    """
    t = batch_level(sigma, x).clamp(_EDGE, 1 - _EDGE)
    wide = x.to(accumulator(x.dtype))
    scaled = linear_combination([wide], stack_rows([1 / (1 - t)], wide))
    data = denoiser(scaled, (t / (1 - t)).to(wide.dtype))
    return linear_combination([wide, data.contiguous()], stack_rows([1 / t, -1 / t], wide)).to(x.dtype)


def edm_denoiser(network: Denoiser, *, sigma_data: float = 0.5) -> Denoiser:
    r"""Returns EDM's denoiser :math:`c_{skip}x + c_{out}F(c_{in}x, \ln(s)/4)` of a raw network F.

    :math:`c_{skip} = d^2/(s^2+d^2)`, :math:`c_{out} = s\,d/\sqrt{s^2+d^2}`, :math:`c_{in} =
    1/\sqrt{s^2+d^2}` with d = `sigma_data`, s the noise level.

    Raises:
        ValueError: `sigma_data` that is not positive.
    """
    if not sigma_data > 0:
        raise ValueError(f"edm_denoiser: sigma_data must be positive, got {sigma_data}")

    def denoise(x: Tensor, level: Tensor) -> Tensor:
        s = batch_level(level, x)
        total = s**2 + sigma_data**2
        scaled = linear_combination([x], stack_rows([total**-0.5], x))
        out = network(scaled, (s.log() / 4).to(x.dtype))
        return linear_combination(
            [x, out.contiguous()], stack_rows([sigma_data**2 / total, s * sigma_data * total**-0.5], x)
        )

    return denoise
