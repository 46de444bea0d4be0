"""The golden problem: the exact velocity of a rectified flow to a mixture of two normals, float64."""

import math

import torch
from torch import Tensor

WEIGHTS, MEANS, STDS = (0.3, 0.7), (-1.5, 1.0), (0.4, 0.6)


def velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """E[eps - x0 | x_sigma = x], exactly; x: [batch, 1], sigma: [batch]."""
    sigma = sigma[:, None]
    alpha = 1 - sigma
    logits, data, noise = [], [], []
    for weight, mean, std in zip(WEIGHTS, MEANS, STDS, strict=True):
        variance, offset = alpha**2 * std**2 + sigma**2, x - alpha * mean
        logits.append(math.log(weight) - variance.log() / 2 - offset**2 / (2 * variance))
        data.append(mean + alpha * std**2 * offset / variance)
        noise.append(sigma * offset / variance)
    posterior = torch.stack(logits).softmax(0)
    return (posterior * (torch.stack(noise) - torch.stack(data))).sum(0)


# Exact flow from sigma = 1 to 0 (DOP853 at 1e-13).
EXACT = {
    -2.5: -2.315809864371,
    -1.0: -1.471092127808,
    -0.25: 0.364352352476,
    0.0: 0.660430731897,
    0.5: 1.089413540970,
    1.0: 1.449954154375,
    2.5: 2.422576626685,
}
# Largest error over linspace(-2.5, 2.5, 41) on a uniform grid of N = 16, 32, 64, 128, 256.
MAX_ERRORS = {
    "euler": (0.1690, 0.0976, 0.0551, 0.0296, 0.0154),
    "midpoint": (3.919e-3, 1.021e-3, 2.611e-4, 6.603e-5, 1.660e-5),
    "heun": (7.072e-3, 1.690e-3, 4.238e-4, 1.061e-4, 2.655e-5),
    "rk4": (3.402e-5, 2.130e-6, 1.324e-7, 8.240e-9, 5.14e-10),
    "ab2": (0.01964, 4.679e-3, 1.114e-3, 2.702e-4, 6.646e-5),
    "ralston": (4.802e-3, 1.236e-3, 3.143e-4, 7.925e-5, 1.990e-5),
    "fireflow": (0.01256, 2.985e-3, 7.469e-4, 1.868e-4, 4.669e-5),
    "dpmpp_2m_neglog": (0.03821, 0.01280, 3.726e-3, 1.081e-3, 3.103e-4),
    "dpmpp_2m": (0.05173, 0.01302, 3.089e-3, 7.834e-4, 2.233e-4),
    "unipc": (0.0142, 4.01e-3, 1.06e-3, 2.59e-4, 6.26e-5),
}
# Where a grid begins, if not at 1: with a level that has a finite log-SNR.
FIRST_LEVEL = {"unipc": 1 - 1e-6}
LAST_DIGIT = {  # half a unit of the last printed digit, relative
    "euler": 4e-3,
    "midpoint": 4e-4,
    "heun": 4e-4,
    "rk4": 2e-3,
    "ab2": 4e-4,
    "ralston": 4e-4,
    "fireflow": 4e-4,
    "dpmpp_2m_neglog": 5e-4,
    "dpmpp_2m": 4e-4,
    "unipc": 4e-3,
}
# x at sigma = 0 from x = -1 and x = .5, N = 16: (method, shift of the grid) -> values.
VALUES = {
    ("euler", 1.0): (-1.390729866412, 1.049191080019),
    ("heun", 1.0): (-1.470577923205, 1.089658778651),
    ("midpoint", 1.0): (-1.471306008722, 1.089868335493),
    ("rf-solver", 1.0): (-1.471306008722, 1.089868335493),
    ("rk4", 1.0): (-1.471086300216, 1.089413035412),
    ("ab2", 1.0): (-1.470885026492, 1.089699825402),
    ("euler", 3.0): (-1.389853306323, 1.045855427142),
    ("ab2", 3.0): (-1.499708489760, 1.099739157998),
    ("ddim", 1.0): (-1.390729866412, 1.049191080019),
    ("dpmpp_2m_neglog", 1.0): (-1.488212048694, 1.098926770239),
    ("dpmpp_2m", 1.0): (-1.468938677319, 1.088701419793),
    ("dpmpp_2m_neglog", 3.0): (-1.549180367329, 1.114013704152),
}
