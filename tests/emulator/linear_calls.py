"""Calls of `linear` for the emulator, and how far its results may be from the definition in float64."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rfkernels.ops.linear import linear_reference, pack_int4, unpack_int4

F64, F32, F16, BF16, I8, E4M3 = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.float8_e4m3fn,
)
AS_THEY_ARE = ("as they are", 0)  # tokens and rotation of the definition: nothing is quantised here
# (dtype of x, storage of the weight): what has a kernel of its own
TENSOR_CORE_KINDS = [
    (I8, "int8"),
    (I8, "int4"),
    (E4M3, "e4m3"),
    *[(dtype, storage) for dtype in (BF16, F16) for storage in ("floating", "int8", "e4m3", "int4")],
]
FMA_KINDS = [(dtype, storage) for dtype in (F32, F64) for storage in ("floating", "int8", "e4m3", "int4")]


@dataclass
class Call:
    """Random arguments of one call; an argument that is given replaces the one that would be made."""

    m: int
    n: int
    k: int
    x_dtype: torch.dtype = BF16
    storage: str = "floating"
    groups: int = 1  # of four-bit codes
    zero: str = "none"  # of four-bit codes: none, integer, offset
    scale: str = "row"  # of the weight: none, one, row
    scale_dtype: torch.dtype = F32
    rank: int = 0
    exact_branch: bool = False  # hidden and up are numbers of both 16-bit types
    up_dtype: torch.dtype | None = None
    bias: torch.dtype | None = None
    gates: int = 0
    gate: torch.dtype = F32
    residual: torch.dtype | None = None
    activation: str = "none"
    dtype: torch.dtype | None = None
    codes: bool = False  # int8 codes as the result
    row_gap: int = 0  # elements between the rows of x, the residual and the result
    shift: int = 0  # elements by which x and the weight are off 16 bytes
    seed: int = 0
    args: dict = field(init=False)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        normal = lambda *shape: torch.randn(shape, generator=generator, dtype=F64)
        wide = F64 if self.x_dtype == F64 else F32
        coded = self.x_dtype in (I8, E4M3)
        self.dtype = I8 if self.codes else self.dtype or (BF16 if coded else self.x_dtype)
        out_like = self.dtype if self.dtype not in (I8,) else BF16
        x = normal(self.m, self.k)
        if self.x_dtype == I8:
            x = (x * 40).round().clamp(-127, 127)
        per_row = lambda count: (0.02 + 0.01 * normal(count).abs()).to(wide)
        weight, weight_scale, weight_zero = self._weight(normal, per_row, generator, wide)
        short = lambda t: t.bfloat16().half().double() if self.exact_branch else t
        self.args = {
            "x": self._placed(self._rows(x.to(self.x_dtype))),
            "x_scale": per_row(self.m).float() if coded else None,
            "weight": self._placed(weight),
            "weight_scale": weight_scale,
            "weight_zero": weight_zero,
            "bias": normal(self.n).to(self.bias) if self.bias else None,
            "hidden": short(normal(self.m, self.rank)).to(wide) if self.rank else None,
            "up": short(0.3 * normal(self.n, self.rank)).to(self.up_dtype or out_like) if self.rank else None,
            "gate": normal(self.gates, self.n).to(self.gate) if self.gates else None,
            "residual": self._rows(normal(self.m, self.n).to(self.residual)) if self.residual else None,
            "out_scale": torch.tensor([0.05], dtype=wide) if self.codes else None,
        }

    def _weight(self, normal, per_row, generator, wide):
        if self.storage == "int4":
            codes = torch.randint(0, 16, (self.n, self.k), generator=generator, dtype=torch.uint8)
            scale = per_row(self.n * self.groups).view(self.n, self.groups).to(self.scale_dtype)
            zero = None
            if self.zero == "integer":
                zero = torch.randint(0, 16, scale.shape, generator=generator, dtype=torch.uint8)
            elif self.zero == "offset":
                zero = (0.05 * normal(*scale.shape)).to(self.scale_dtype)
            return pack_int4(codes), scale if self.groups > 1 or zero is not None else scale[:, 0], zero
        weight = normal(self.n, self.k)
        scale = {"none": None, "one": per_row(1), "row": per_row(self.n)}[self.scale]
        if self.storage == "int8":
            return (weight * 40).round().clamp(-127, 127).to(I8), scale, None
        if self.storage == "e4m3":
            return weight.to(E4M3), scale, None
        return (weight * self.k**-0.5).to(self.x_dtype), None, None

    def _rows(self, t: Tensor) -> Tensor:
        wide = t.new_zeros(t.shape[0], t.shape[1] + self.row_gap)
        wide[:, : t.shape[1]] = t
        return wide[:, : t.shape[1]]

    def _placed(self, t: Tensor) -> Tensor:
        """The same numbers, `shift` elements past 16 bytes."""
        if not self.shift:
            return t
        room = t.new_zeros(t.shape[0] * t.stride(0) + self.shift)
        moved = room[self.shift :].as_strided(t.shape, t.stride())
        moved.copy_(t)
        assert moved.data_ptr() % 16
        return moved

    def run(self, emulated) -> Tensor:
        out = self._rows(torch.full((self.m, self.n), 77, dtype=self.dtype))
        bits = lambda t: t.view(torch.uint8) if t is not None and t.dtype == E4M3 else t
        emulated.linear(out, *map(bits, self.args.values()), None, self.activation)
        return out

    def true(self) -> Tensor:
        """The definition in float64, of the numbers that the kernels multiply."""
        args = dict(self.args)
        args = {name: t.double() if self._is_number(name, t) else t for name, t in args.items()}
        return linear_reference(*args.values(), *AS_THEY_ARE, self.activation, I8 if self.codes else F64)

    def _is_number(self, name: str, t: Tensor | None) -> bool:
        return t is not None and t.dtype != torch.uint8

    def scale_of_terms(self) -> Tensor:
        """What the sum of each result would be if nothing cancelled: rounding errors are relative to it."""
        args = {name: t.double().abs() if self._is_number(name, t) else t for name, t in self.args.items()}
        if self.storage == "int4":
            low = unpack_int4(self.args["weight"])
            args["weight"] = pack_int4(torch.full_like(low, 15))
            args["weight_zero"] = None
            extra = self.args["weight_zero"]
            if extra is not None and extra.is_floating_point():
                args["weight_scale"] = args["weight_scale"] + extra.double().abs()
            elif extra is not None:
                args["weight_scale"] = 2 * args["weight_scale"]
        args["out_scale"] = None
        return linear_reference(*args.values(), *AS_THEY_ARE, "none", F64)


EPSILON = {F64: 2.0**-53, F32: 2.0**-24, F16: 2.0**-11, BF16: 2.0**-8}
TINY = {F64: 0.0, F32: 0.0, F16: 2.0**-24, BF16: 0.0}  # half the distance of subnormals, and more


def error_of_sums(call: Call) -> Tensor:
    """What sums of rounded terms may be off, before the result is rounded (csrc/linear/kernels.h)."""
    terms = call.scale_of_terms()
    if call.x_dtype == F64:
        return 4 * call.k * EPSILON[F64] * terms
    slack = (2.0**-22 + 2.0**-24 * call.k**0.5) * terms
    weight = call.args["weight"]
    whole = (weight.shape[1] * weight.itemsize | weight.data_ptr()) % 16 == 0  # it is read by 16 bytes
    few = call.m <= 8 and call.x_dtype not in (I8, E4M3) and whole
    if (
        call.rank and call.x_dtype != F32 and not few and not call.exact_branch
    ):  # both sides of the branch are rounded to 16 bits
        branch = call.args["hidden"].double().abs() @ call.args["up"].double().abs().T
        if call.gates:
            branch = branch * call.args["gate"].double().abs().repeat_interleave(call.m // call.gates, 0)
        slack = slack + 2.0**-6 * branch / call.rank**0.5
    return slack


def assert_close(call: Call, out: Tensor) -> None:
    """Rounded once to the dtype of the result, but for what `error_of_sums` allows."""
    true, slack = call.true(), 1.2 * error_of_sums(call)  # activations have slopes up to 1.13
    if call.activation == "relu2":
        slack = slack * (2 * call.scale_of_terms() + 1)
    if call.codes:
        assert ((out.double() - true).abs() <= 1).all()
        assert (out.double() == true).double().mean() > 0.97
        return
    bound = slack + EPSILON[call.dtype] * (true.abs() + slack) + TINY[call.dtype]
    error = (out.double() - true).abs()
    assert out.isfinite().all() and (error <= bound).all(), f"{(error / bound).max():.3g} of the bound"
    if out.numel() >= 500 and (call.rank == 0 or call.exact_branch):
        assert (error.norm() / true.norm()).item() < 2e-3
