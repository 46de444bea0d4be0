"""Counter-based noise: every number is a pure function of (seed, sample, step, position).

A sample's noise depends neither on the batch around it nor on the device: the CPU and CUDA kernels give
the same bits. Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) makes
four words per counter, the Box-Muller transform four normals in float32 of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rfkernels import _C
from rfkernels.ops._register import define, expand_rows, row_scalar, sum_to_rows

__all__ = [
    "noise_keys",
    "philox_normal",
    "philox_normal_reference",
    "renoise",
    "renoise_reference",
]


def noise_keys(
    seed: int | Sequence[int],
    batch: int,
    *,
    step: int = 0,
    first_sample: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Returns the keys of a batch, `int64[batch, 3]` with rows (seed, sample, step).

    With one seed the samples are numbered from `first_sample` on. With a list, one seed per sample, every
    sample number is `first_sample`, so that a picture depends on its own seed alone. A captured graph moves
    to the next step by `keys[:, 2] += 1`.

    Raises:
        ValueError: seeds outside 0 .. 2**63 - 1, steps or samples outside 0 .. 2**32 - 1, or as many seeds as
            there are not samples.
    """
    seeds, samples = seed, first_sample
    if isinstance(seed, int):
        seeds, samples = [seed] * batch, range(first_sample, first_sample + batch)
    else:
        samples = [first_sample] * batch
    if len(seeds) != batch:
        raise ValueError(f"noise_keys: expected one seed or {batch} seeds, got {len(seeds)}")
    for name, values, bits in (("seed", seeds, 63), ("sample", samples, 32), ("step", [step], 32)):
        for value in values:
            if not 0 <= value < 2**bits:
                raise ValueError(f"noise_keys: {name} must be in 0 .. 2**{bits} - 1, got {value}")
    rows = [[s, n, step] for s, n in zip(seeds, samples, strict=True)]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(batch, 3)


def philox_normal(shape: Sequence[int], keys: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns standard normal noise of `shape`, row b drawn from `keys[b]`, on the device of `keys`.

    The numbers are float32 for every dtype, rounded to 16 bits or widened to 64; at most 6.8 in size.

    Args:
        shape: `[batch, ...]`.
        keys: `int64[batch, 3]`, see `noise_keys`.
        dtype: float64, float32, float16 or bfloat16.

    Raises:
        ValueError: keys that are not `int64[batch, 3]`, or a dtype that is not floating.
    """
    return _philox_normal(shape, keys, dtype)


def philox_normal_reference(shape: Sequence[int], keys: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The definition of `philox_normal` in plain torch: integers exactly, Box-Muller in float64."""
    batch, size = shape[0], torch.Size(shape[1:]).numel()
    words = _blocks(size, keys)
    normals = []
    for a, b in (words[:2], words[2:]):
        radius = (-2 * torch.log((a.double() + 0.5) / 2**32)).sqrt()
        angle = 2 * torch.pi * b.double() / 2**32
        normals += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(normals, -1).view(batch, -1)[:, :size].reshape(tuple(shape)).to(dtype)


def philox_words(size: int, keys: Tensor) -> Tensor:
    """The words behind the noise, int64 `[batch, size]`: element i is word i % 4 of block i / 4."""
    return torch.stack(_blocks(size, keys), -1).flatten(1)[:, :size]


_WORD = 2**32 - 1


def _blocks(size: int, keys: Tensor) -> list[Tensor]:
    """The four words of each block, int64 `[batch, blocks]`."""
    blocks = torch.arange((size + 3) // 4, dtype=torch.int64, device=keys.device)
    seed, sample, step = (k.view(len(keys), 1) for k in keys.unbind(1))
    counter = [blocks & _WORD, blocks >> 32, sample & _WORD, step & _WORD]
    counter = [c.expand(len(keys), len(blocks)) for c in counter]
    return _philox4x32(counter, seed & _WORD, (seed >> 32) & _WORD)


def _philox4x32(c: list[Tensor], k0: Tensor, k1: Tensor) -> list[Tensor]:
    """Philox4x32-10 on words held in int64."""
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c[0])
        high1, low1 = _multiply(0xCD9E8D57, c[2])
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c


def _multiply(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of m * x, by halves, since int64 has no room for the product's sign bit."""
    low, high = m * (x & 0xFFFF), m * (x >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


_philox_normal = define(
    "philox_normal",
    "SymInt[] shape, Tensor keys, ScalarType dtype",
    lambda out, shape, keys, dtype: _C.philox_normal(out, keys),
    lambda shape, keys, dtype: torch.empty(shape, dtype=dtype, device=keys.device),
    philox_normal_reference,
)


def renoise(
    x: Tensor, k: float | Tensor, c: float | Tensor, keys: Tensor, *, out: Tensor | None = None
) -> Tensor:
    r"""Returns :math:`k\,x + c\,z` with fresh noise :math:`z`, which is never stored.

    From sigma_a up to sigma_b of a rectified flow: :math:`k = (1-\sigma_b)/(1-\sigma_a)`,
    :math:`c = \sqrt{\sigma_b^2 - k^2\sigma_a^2}` (time travel of RePaint and MOTIA); the full re-noise of a
    data estimate is `k = 1 - sigma`, `c = sigma`.

    Args:
        x: the state, `[batch, ...]`, float64, float32, float16 or bfloat16, contiguous.
        k, c: row scalars, as in `rfkernels.ops.solver`.
        keys: `int64[batch, 3]`, see `noise_keys`.
        out: where to write, `x` itself allowed; no gradient then.

    Raises:
        ValueError: tensors that do not fit together.
    """
    return _renoise(x, row_scalar(k, x), row_scalar(c, x), keys, out=out)


def renoise_reference(x: Tensor, k: Tensor, c: Tensor, keys: Tensor) -> Tensor:
    """The definition of `renoise` in plain torch."""
    z = philox_normal_reference(x.shape, keys, c.dtype)
    return (expand_rows(k, x) * x + expand_rows(c, x) * z).to(x.dtype)


def _renoise_backward(grad, needs, x, k, c, keys):
    grad_c = None
    if needs[2]:
        z = philox_normal(x.shape, keys, dtype=c.dtype)
        grad_c = sum_to_rows(grad * z, c)
    return (
        (grad * expand_rows(k, x)).to(x.dtype) if needs[0] else None,
        sum_to_rows(grad * x, k) if needs[1] else None,
        grad_c,
        None,
    )


_renoise = define(
    "renoise",
    "Tensor x, Tensor k, Tensor c, Tensor keys",
    _C.renoise,
    lambda x, k, c, keys: torch.empty_like(x),
    renoise_reference,
    _renoise_backward,
)
