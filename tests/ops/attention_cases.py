"""Calls of `attention` drawn at random, their results in float64 and what torch's attention makes of them."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from rfkernels import ops
from rfkernels.ops._attention_parts import BLOCK_KEYS, BLOCK_ROWS, hidden_keys, shifted, toeplitz
from tests.ops.cases import BF16, F16, F32, F64

FLOATS = (F64, F32, F16, BF16)
HEAD_DIMS = (1, 3, 8, 24, 40, 64, 72, 80, 96, 128, 256)
# around the tiles of the CPU kernel: 12 rows; 32 keys, and 256 of them
LENGTHS = (0, 1, 11, 12, 13, 31, 32, 33, 64, 127, 128, 129, 255, 256, 257, 300, 513)
MOST_PRODUCTS = 1 << 25  # of a random call

Pick = Callable[..., object]  # pick(*choices) is one of them


@dataclass(frozen=True)
class Call:
    """Arguments of the public function."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict = field(default_factory=dict)

    def run(self, precision: str = "full", **options) -> tuple[Tensor, Tensor]:
        options = self.options | options
        return ops.attention(self.q, self.k, self.v, precision=precision, return_lse=True, **options)

    def exact(self) -> tuple[Tensor, Tensor]:
        """The definition in float64, sequence by sequence."""
        return self.each(_exact)

    def peer(self) -> Tensor:
        """The result of torch's attention in the dtype of the tensors."""
        return self.each(_torch_attention)[0]

    def each(self, f: Callable) -> tuple[Tensor, Tensor]:
        """f of every sequence, [batch, heads, tokens, d] tensors and options, joined as the call has them."""
        o = {"bias": None, "factor": None, "key_lengths": None, "block_mask": None, "head_shift": None}
        o |= {"scale": self.q.shape[-1] ** -0.5, "frames": 1, "layout": "bhld"}
        o |= {name: value for name, value in self.options.items() if value is not None}
        starts, layout = o.pop("cu_seqlens", None), o.pop("layout")
        o.pop("key_mean", None)
        if o["bias"] is not None and o["bias"].dtype == torch.bool:
            o["bias"] = torch.where(o["bias"], 0.0, -torch.inf).to(self.q.dtype)
        tensors = self.q, self.k, self.v
        if starts is None:
            out, lse = f(*(t.transpose(1, 2) if layout == "blhd" else t for t in tensors), **o)
            return (out.transpose(1, 2) if layout == "blhd" else out), lse
        q_starts, k_starts = (starts.tolist() for starts in pair(starts))
        parts = []
        for (i, i_end), (j, j_end) in zip(pairwise(q_starts), pairwise(k_starts), strict=True):
            own = self.q[i:i_end], self.k[j:j_end], self.v[j:j_end]
            parts.append(f(*(t.transpose(0, 1)[None] for t in own), **o))
        return torch.cat([p[0] for p in parts], 2)[0].transpose(0, 1), torch.cat([p[1] for p in parts], 2)[0]

    def heads_first(self, out: Tensor) -> Tensor:
        """A result as [.., heads, tokens, d], the axes of the logarithms first."""
        packed, layout = "cu_seqlens" in self.options, self.options.get("layout", "bhld")
        return out.transpose(-3, -2) if packed or layout == "blhd" else out

    def but(self, **options) -> "Call":
        """The call with other tensors or options."""
        tensors = {name: options.pop(name) for name in "qkv" if name in options}
        return replace(self, **tensors, options=self.options | options)


def pair(starts: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return starts if isinstance(starts, tuple) else (starts, starts)


def _exact(q, k, v, *, bias, factor, key_lengths, block_mask, head_shift, scale, frames):
    tables = [None if t is None else t.double() for t in (bias, factor)]
    others = (key_lengths, None, None, block_mask, head_shift, None, scale, frames, "full")
    return ops.attention_reference(*(t.double() for t in (q, k, v)), *tables, *others)


def _torch_attention(q, k, v, *, bias, factor, key_lengths, block_mask, head_shift, scale, frames):
    """torch's attention; beside a factor its steps: float32 weights, rounded for the second product."""
    rows, keys, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    lse = q.new_zeros(q.shape[:3])
    if keys == 0:
        return torch.zeros_like(q), lse
    hidden = hidden_keys(q, keys, key_lengths, None, None, block_mask, head_shift, frames)
    mask = bias
    if hidden is not None:
        mask = torch.zeros_like(hidden, dtype=q.dtype) if mask is None else mask
        mask = mask.masked_fill(hidden, -torch.inf)
    k, v = (t.repeat_interleave(group, 1) for t in shifted(k, v, head_shift, frames))
    if factor is None:
        mask = None if mask is None else mask.expand(*mask.shape[:2], rows, keys)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        scores = scale * (q.float() @ k.float().mT)
        weights = (scores if mask is None else scores + mask.float()).softmax(-1)
        out = ((weights * toeplitz(factor, rows, keys)).to(v.dtype).float() @ v.float()).to(v.dtype)
    return out.nan_to_num(), lse  # a row that sees nothing


def chooser(seed: int) -> Pick:
    """Choices that follow from a seed."""
    generator = random.Random(seed)
    return lambda *choices: generator.choice(choices)


def random_call(pick: Pick, dtype: torch.dtype, device: str = "cpu", *, tame: bool = False) -> Call:
    """Shapes, strides and options; `tame`: data of which eight bits promise something."""
    draw = Draw(pick, dtype, device, tame)
    return draw.packed() if pick(False, False, False, True) else draw.padded()


@dataclass
class Draw:
    """One random call in the making."""

    pick: Pick
    dtype: torch.dtype
    device: str
    tame: bool

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.pick(*range(100)))
        self.wide = F64 if self.dtype == F64 else F32
        self.d = self.pick(*HEAD_DIMS)
        self.kv_heads = self.pick(1, 2, 3)
        self.heads = self.kv_heads * self.pick(1, 1, 2, 3)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=F64).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator).to(self.device)

    def padded(self) -> Call:
        pick = self.pick
        frames, rows = pick(1, 1, 2, 3), pick(*LENGTHS)
        batch, keys = frames * pick(1, 2), pick(rows, pick(*LENGTHS))
        if batch * self.heads * rows * keys * self.d > MOST_PRODUCTS:
            batch = frames = 1
        layout = pick("bhld", "blhd")
        q, k, v = self.tokens((batch,), rows, keys)
        if layout == "bhld":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        options = {"layout": layout, "scale": self.scale()}
        if pick(False, True):
            options["bias"] = self.bias(batch, rows, keys)
        if pick(False, False, True) and rows + keys:
            table = self.normal(pick(1, self.heads), rows + keys - 1)
            options["factor"] = (1 + 0.2 * table if self.tame else table).to(self.wide)
        if pick(False, True):
            lengths = self.integers(0, keys, batch)
            options["key_lengths"] = lengths.to(pick(torch.int32, torch.int64))
        if pick(False, False, True):
            across = -(-rows // BLOCK_ROWS), -(-keys // BLOCK_KEYS)
            shape = pick(1, batch), pick(1, self.heads), *across
            options["block_mask"] = self.integers(0, 2, *shape) > 0
        if frames > 1 or pick(False, False, True):
            options["head_shift"], options["frames"] = self.integers(-2, 2, self.kv_heads), frames
        return Call(q, k, v, options)

    def packed(self) -> Call:
        sequences = self.pick(1, 2, 5)
        starts = []
        for _ in "qk":
            lengths = [self.pick(*LENGTHS[:13]) for _ in range(sequences)]
            starts.append(torch.tensor([0, *lengths], device=self.device).cumsum(0).to(torch.int32))
        own = self.pick(False, True)  # self-attention
        q_starts, k_starts = starts[0], starts[0] if own else starts[1]
        q, k, v = self.tokens((), int(q_starts[-1]), int(k_starts[-1]))
        return Call(q, k, v, {"cu_seqlens": q_starts if own else (q_starts, k_starts), "scale": self.scale()})

    def scale(self) -> float | None:
        usual = self.d**-0.5
        return self.pick(None, usual) if self.tame else self.pick(None, 3 * usual, -usual)

    def tokens(self, lead: tuple[int, ...], rows: int, keys: int) -> list[Tensor]:
        """q, k and v [*lead, tokens, heads, d] in memory of several forms."""
        lengths, heads = (rows, keys, keys), (self.heads, self.kv_heads, self.kv_heads)
        values = [
            self.normal(*lead, n, h, self.d).to(self.dtype) for n, h in zip(lengths, heads, strict=True)
        ]
        if rows == keys and self.pick(False, True):
            fused = torch.cat([t.flatten(-2) for t in values], -1)
            parts = fused.split([h * self.d for h in heads], -1)
            return [t.unflatten(-1, (h, self.d)) for t, h in zip(parts, heads, strict=True)]
        return [stored(t, self.pick("as it is", "heads first", "wide", "odd")) for t in values]

    def bias(self, batch: int, rows: int, keys: int) -> Tensor:
        pick = self.pick
        shape = pick(1, batch), pick(1, self.heads), pick(1, rows), keys
        hidden = self.integers(0, 4, *shape) == 0
        if pick(False, False, True):
            return ~hidden
        bias = self.normal(*shape).to(pick(self.wide, self.dtype))
        if pick(False, True):
            bias = bias.masked_fill(hidden, -torch.inf)
        if pick(False, True):  # every query its own row of memory, which is one
            bias = bias.expand(batch, self.heads, bias.shape[2], keys)
        return bias


def stored(t: Tensor, form: str) -> Tensor:
    """The numbers of t [*lead, tokens, heads, d] elsewhere in memory, among NaN."""
    if form == "heads first":
        return t.transpose(-3, -2).contiguous().transpose(-3, -2)
    if form == "wide":
        wide = t.new_full((*t.shape[:-2], t.shape[-2] * t.shape[-1] + 7), torch.nan)
        wide[..., 3:-4] = t.flatten(-2)
        return wide[..., 3:-4].unflatten(-1, t.shape[-2:])
    if form == "odd":  # off every alignment but its own
        memory = t.new_full((t.numel() + 2,), torch.nan)
        memory[1:-1] = t.flatten()
        return memory[1:-1].view(t.shape)
    return t


def simple(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0, **options) -> Call:
    """Normal q, k, v of (batch, heads, kv_heads, rows, keys, d)."""
    batch, heads, kv_heads, rows, keys, d = shape
    g = torch.Generator().manual_seed(seed)
    normal = lambda h, n: torch.randn(batch, h, n, d, generator=g, dtype=F64).to(device, dtype)
    return Call(normal(heads, rows), normal(kv_heads, keys), normal(kv_heads, keys), options)


# --- errors ---


def assert_matches(call: Call, precision: str = "full") -> None:
    """The result within what its precision promises, zero and -infinity where nothing is seen."""
    out, lse = call.run(precision)
    exact, exact_lse = call.exact()
    wide = F64 if call.q.dtype == F64 else F32
    assert out.dtype == call.q.dtype and out.shape == call.q.shape
    assert lse.dtype == wide and lse.shape == exact_lse.shape
    unseen = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, unseen)
    out, exact = call.heads_first(out), call.heads_first(exact)
    assert (out[unseen] == 0).all()
    off = (lse.double() - exact_lse).masked_fill(unseen, 0).abs() / (
        1 + exact_lse.masked_fill(unseen, 0).abs()
    )
    eight_bits = precision in ("int8", "fp8")
    limit = 4e-2 if eight_bits else 1e-12 if wide == F64 else 1e-5  # of one score, where one key is seen
    assert out.numel() == 0 or off.max() <= limit, f"lse is off by {off.max():.2e}"
    if out.numel() == 0:
        return
    if eight_bits:  # channels too few for errors to cancel
        assert_near(out, exact, cosine=0.9995, l1=0.02 if out.shape[-1] >= 32 else 0.06)
    else:
        assert_as_torch(out, exact, None if wide == F64 else call.heads_first(call.peer()))


def assert_as_torch(out: Tensor, exact: Tensor, peer: Tensor | None) -> None:
    """Errors of at most twice those of torch's attention (FlashAttention's rule); float64: of rounding."""
    errors = (out.double() - exact).abs()
    scale = exact.abs().max()
    if peer is None:
        assert errors.max() <= 1e-12 * scale, worst(out, exact)
        return
    theirs = (peer.double() - exact).abs()
    if out.dtype == F32:
        assert errors.max() <= 2 * theirs.max() + 1e-6 * scale.clamp_min(1), worst(out, exact)
        return
    half_step = torch.finfo(out.dtype).eps / 2
    assert errors.max() <= 2 * theirs.max() + half_step * scale, worst(out, exact)
    assert errors.mean() <= 1.5 * theirs.mean() + 0.05 * half_step * exact.abs().mean(), worst(out, exact)


def assert_near(out: Tensor, exact: Tensor, *, cosine: float, l1: float = torch.inf) -> None:
    """What eight bits promise."""
    near = cosine_of(out, exact)
    off = l1_of(out, exact)
    assert near >= cosine and off <= l1, f"cosine {near:.5f}, relative L1 {off:.4f}; {worst(out, exact)}"


def cosine_of(out: Tensor, exact: Tensor) -> float:
    return float(F.cosine_similarity(out.double().flatten(), exact.flatten(), 0)) if exact.any() else 1.0


def l1_of(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).abs().sum() / exact.abs().sum().clamp_min(1e-30))


def worst(out: Tensor, exact: Tensor) -> str:
    """Where [.., heads, rows, d] results are off most."""
    difference = out.double() - exact
    norm = lambda t, axes: t.norm(dim=axes) / exact.norm(dim=axes).clamp_min(1e-30)
    place = lambda t: [int(i) for i in torch.unravel_index(t.argmax(), t.shape)]
    rows, heads = norm(difference, -1), norm(difference, (-2, -1))
    return (
        f"off by {difference.abs().max():.2e} at {place(difference.abs())} of {list(out.shape)}, relative L2 "
        f"{rows.max():.2e} in row {place(rows)} and {heads.max():.2e} in head {place(heads)}"
    )
