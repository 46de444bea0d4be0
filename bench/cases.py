"""What is timed: one `Case` per op, dtype and shape, with its peers and the bytes that it must move."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# dtypes of (state and result, velocities). The mixed pair is how samplers run 16-bit models.
DTYPES = {
    "f32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "f32+bf16": (torch.float32, torch.bfloat16),
}

# Plain sizes in elements (1 M = 2^20): four samples, so that the coefficients of rows are exercised.
SIZES = {"1M": (4, 1 << 18), "16M": (4, 1 << 22), "64M": (4, 1 << 24)}

# What samplers step in named models.
MODELS = {
    "FLUX 1024x1024": (1, 4096, 64),  # 64x64 packed tokens of 2x2 patches x 16 channels
    "Wan 480p 81 frames": (1, 16, 21, 60, 104),  # channels, frames / 4, height / 8, width / 8
    "emoji sheet": (16, 4, 64, 64),  # sixteen pictures of the embedded model, RGBA
}


@dataclass(frozen=True)
class Case:
    """One op on one shape: ours, the formula in plain torch, and the bytes of minimal passes.

    Every side takes the same large tensors, `inputs()`. Small coefficients are closed over; the peers get
    theirs already shaped and cast, so that they are charged with arithmetic alone. A tuple of results stands
    for their stack.
    """

    room: str
    op: str
    label: str  # "16M" or the model whose latent it is
    shape: tuple[int, ...]  # of the result (of codes: of the tokens)
    dtypes: str  # key of DTYPES
    bytes_moved: int  # every input read once, the result written once
    inputs: Callable[[], tuple[Tensor, ...]]  # random, none zero
    ours: Callable[..., Tensor | tuple[Tensor, ...]]  # ours(out, *inputs), allocates for out=None
    formula: Callable[..., Tensor | tuple[Tensor, ...]]  # formula(*inputs), as one writes it in torch
    formula_out: Callable[..., Tensor] | None = None  # the best eager form that writes to out
    has_out: bool = True  # ours can write to a tensor that is there
    value: Callable[..., Tensor] | None = (
        None  # value(*results) is compared; absent: the result, or the stack
    )
    operations: int = 0  # multiplications and additions of a product; 0: the case is bound by memory
    product: str = ""  # the arithmetic whose peak is its roof: int8, bf16 or f32
    peers: dict[str, Callable[..., Tensor]] = field(
        default_factory=dict
    )  # others, peer(*inputs), not compared
    tolerance: float = 1e-5  # |ours - formula| <= tolerance * (1 + |formula|); 0: random, not compared

    @property
    def name(self) -> str:
        return f"{self.op} {self.dtypes}{list(self.shape)}"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the result."""
        return DTYPES[self.dtypes][0]


def nbytes(numel: int, *dtypes: torch.dtype) -> int:
    """The bytes of one array of `numel` elements in each of the dtypes."""
    return numel * sum(dtype.itemsize for dtype in dtypes)


def tolerance(dtypes: str) -> float:
    """What rounding explains: eager rounds a 16-bit result after every operation, ours once."""
    return 1e-5 if DTYPES[dtypes][0] == torch.float32 else 8e-2


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Normal values (integers: uniform) without a zero; a block of 2^20 is repeated, to be quick on a CPU."""
    numel = torch.Size(shape).numel()
    generator = torch.Generator(device).manual_seed(seed)
    count = min(numel, 1 << 20)
    if dtype.is_floating_point:
        block = torch.randn(count, generator=generator, device=device)
        block = torch.where(block == 0, 1.0, block).to(dtype)
    else:
        high = min(torch.iinfo(dtype).max, 1 << 30)
        block = torch.randint(1, high, (count,), generator=generator, device=device, dtype=dtype)
    flat = torch.empty(numel, dtype=dtype, device=device)
    for start in range(0, numel, block.numel()):
        part = flat[start : start + block.numel()]
        part.copy_(block[: part.numel()])
    return flat.view(shape)


def row_values(shape: tuple[int, ...], device: str, seed: int) -> Tensor:
    """float32 coefficients in [0.5, 1.5), one a row."""
    generator = torch.Generator(device).manual_seed(seed)
    return 0.5 + torch.rand(shape, generator=generator, device=device)


def for_peers(coef: Tensor, ndim: int, dtype: torch.dtype) -> Tensor:
    """A row coefficient shaped to broadcast over `ndim` dimensions, in the dtype that eager computes in."""
    return coef.to(dtype).reshape(*coef.shape, *[1] * (ndim - coef.ndim))


# --- eight-bit codes ---

# tolerance of values of order one to twenty where two sides encode: a step of the code, at a tie
STEP = {"int8": 0.3, "fp8": 0.15}
_CODES = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


def quantize(x: Tensor, format: str, rotation: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows, as one writes it in torch; `rotation`: the matrix for groups of them."""
    dtype, limit = _CODES[format]
    if rotation is not None:
        x = (x.unflatten(-1, (-1, len(rotation))) @ rotation).flatten(-2)
    x = x.float()
    scales = x.abs().amax(-1, keepdim=True).clamp_min(1e-28) / limit
    x = x / scales
    return (x.round() if format == "int8" else x).to(dtype), scales[..., 0]


def values(codes: Tensor, scales: Tensor) -> Tensor:
    """What the codes stand for."""
    return codes.float() * scales[..., None]
