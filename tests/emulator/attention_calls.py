"""Calls of `attention` for the emulator, and how far its results may be from the definition in float64."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rfkernels.ops._attention import attention_reference

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
NAMES = ["q", "k", "v", "bias", "factor", "key_lengths", "q_starts", "k_starts", "block_mask", "head_shift"]
NAMES += ["key_mean"]


@dataclass
class Call:
    """Random arguments of one call; what is put into `args` afterwards replaces what has been made."""

    rows: int = 64
    keys: int | None = None
    d: int = 64
    dtype: torch.dtype = BF16
    batch: int = 1
    heads: int = 1
    kv_heads: int | None = None
    layout: str = "bhld"  # or blhd, or qkv: slices of one buffer
    shift: int = 0  # elements by which q, k and v are off 16 bytes
    bias: tuple[int, int, int] | None = None  # its axes but for keys
    bias_dtype: torch.dtype | None = None
    factor: int | None = None  # heads of it
    key_lengths: list[int] | None = None
    q_lengths: list[int] | None = None  # of packed sequences, with k_lengths
    k_lengths: list[int] | None = None
    head_shift: list[int] | None = None
    frames: int = 1
    scale: float | None = None
    precision: str = "full"
    offset: float = 0  # of all keys
    outliers: float = 1  # factor of a few channels of k
    seed: int = 0
    args: dict = field(init=False)

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)
        if self.q_lengths is not None:
            self.rows, self.keys = sum(self.q_lengths), sum(self.k_lengths)
        self.keys = self.rows if self.keys is None else self.keys
        self.kv_heads = self.kv_heads or self.heads
        self.scale = self.d**-0.5 if self.scale is None else self.scale
        wide = F64 if self.dtype == F64 else F32
        integers = lambda values: None if values is None else torch.tensor(values, dtype=torch.int32)
        starts = lambda lengths: None if lengths is None else integers([0, *lengths]).cumsum(0).int()
        q, k, v = self._tokens()
        bias = None
        if self.bias is not None:
            bias = self.normal(*self.bias, self.keys).to(self.bias_dtype or wide)
        factor = None
        if self.factor is not None:
            factor = self.normal(self.factor, self.rows + self.keys - 1).to(wide)
        tables = [integers(self.key_lengths), starts(self.q_lengths), starts(self.k_lengths), None]
        values = [q, k, v, bias, factor, *tables, integers(self.head_shift), None]
        self.args = dict(zip(NAMES, values, strict=True))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=F64)

    def _tokens(self) -> list[Tensor]:
        """q, k and v [batch, heads, tokens, d]."""
        heads = [self.heads, self.kv_heads, self.kv_heads]
        lengths = [self.rows, self.keys, self.keys]
        numbers = [self.normal(self.batch, n, h, self.d) for n, h in zip(lengths, heads, strict=True)]
        numbers[1][..., 1 :: max(self.d // 4, 2)] *= self.outliers
        numbers[1] += self.offset
        if self.layout == "qkv":
            buffer = torch.cat(numbers, 2).to(self.dtype)
            return [t.transpose(1, 2) for t in buffer.split(heads, 2)]
        if self.layout == "bhld":
            numbers = [t.transpose(1, 2) for t in numbers]
        placed = [self._placed(t.to(self.dtype).contiguous()) for t in numbers]
        return placed if self.layout == "bhld" else [t.transpose(1, 2) for t in placed]

    def _placed(self, t: Tensor) -> Tensor:
        """The same numbers, `shift` elements past 16 bytes."""
        if not self.shift:
            return t
        room = t.new_zeros(t.numel() + self.shift)
        return room[self.shift :].view(t.shape).copy_(t)

    def of(self, name: str) -> Tensor:
        return self.args[name]

    @property
    def sequences(self) -> int:
        starts = self.args["q_starts"]
        return self.batch if starts is None else len(starts) - 1

    def run(self, emulated) -> tuple[Tensor, Tensor]:
        """out and lse; `fell_back` is kept."""
        q, k = self.args["q"], self.args["k"]
        out = torch.full(q.shape, 77, dtype=self.dtype)
        if self.layout != "bhld":
            out = out.transpose(1, 2).contiguous().transpose(1, 2)
        lse = torch.full(q.shape[:3], 77, dtype=F64 if self.dtype == F64 else F32)
        self.fell_back = None
        if self.precision == "auto":
            self.fell_back = torch.full((self.sequences, self.heads), 77, dtype=torch.uint8)
        size = emulated.attention_workspace(q, k, self.args["q_starts"], self.precision)
        workspace = torch.full((size,), 0xAB, dtype=torch.uint8) if size else None
        rest = (self.fell_back, workspace, self.scale, self.frames, self.precision)
        emulated.attention(out, lse, *self.args.values(), *rest)
        return out, lse

    def reference(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        convert = lambda t: t.to(dtype) if t is not None and t.is_floating_point() else t
        args = [convert(t) for t in self.args.values()]
        return attention_reference(*args, self.scale, self.frames, "full")

    def true(self) -> tuple[Tensor, Tensor]:
        """The definition in float64."""
        return self.reference(F64)


# What the same computation may be wrong by in torch: weights and result rounded to the dtype, sums in float.
EPSILON = {F64: 2.0**-52, F32: 2.0**-22, F16: 2.0**-11, BF16: 2.0**-8}


def assert_close(call: Call, out: Tensor, lse: Tensor) -> None:
    """Within twice the error of weights and result that are rounded to the dtype."""
    expected, expected_lse = call.true()
    out, epsilon = out.double(), EPSILON[call.dtype]
    values = attention_reference(*_of_magnitudes(call), call.scale, call.frames, "full")[0]
    scores = 1 + abs(call.scale) * _largest(call.of("q")) * _largest(call.of("k"))
    if call.dtype in (F32, F64):  # where weights are wrong by what scores are
        epsilon = epsilon * scores
    bound = 2 * epsilon * (expected.abs() + values) + 2.0**-24
    error = (out - expected).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.3g} of the bound"
    if out.numel() > 2000:
        assert error.norm() <= 1.2 * epsilon * expected.norm() + 1e-9
    seen = expected_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    wrong = (lse.double() - expected_lse)[seen].abs()
    assert (wrong <= (2.0**-48 if call.dtype == F64 else 2.0**-21) * scores).all()


def _largest(tokens: Tensor) -> float:
    return tokens.double().norm(dim=-1).max().item() if tokens.numel() else 0.0


def _of_magnitudes(call: Call) -> list:
    """The arguments of the definition with |v| and |factor|."""
    args = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in call.args.items()}
    args["v"] = args["v"].abs()
    if args["factor"] is not None:
        args["factor"] = args["factor"].abs()
    return list(args.values())


def similarity(out: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative error (L2) and cosine."""
    out, expected = out.double().flatten(), expected.flatten()
    error = (out - expected).norm() / expected.norm()
    return error.item(), torch.nn.functional.cosine_similarity(out, expected, 0).item()
