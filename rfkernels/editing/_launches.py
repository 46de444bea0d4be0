"""What the editors share: checks, and launches whose coefficients wait on the device."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rfkernels.ops import combine
from rfkernels.ops._register import accumulator

__all__ = [
    "Launches",
    "Velocity",
    "evaluate",
    "falling",
    "finite",
    "levels",
    "like",
    "one_of",
    "rising",
    "weight_of",
]

Velocity = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, Tensor]"]
Row = Mapping[str, float]


class Launches:
    r"""One `combine` a step: row i of a table of coefficients that went to the device in one copy.

    A row names what it multiplies; "v" is the velocity, with guidance :math:`(1-w)u + w c`, which becomes two
    columns. Rows of names that are not given are 0.

    Args:
        x: the state: its dtype, device and batch.
        names: the tensors of a launch in order. With guidance "v" is two tensors, u and c, side by side; or
            "u" and "c" stand in the names, and "v" in the rows alone.
        steps: for each step the rows of its results.
        inside: where a mask is 1, rows as `steps`.
        weight: w, float64 `[]` or `[batch]`; None without guidance.
        guide, guidance: a guide of `combine` and its parameters, `[steps][parameters]`; its result is "g".
        noise: whether there is a column "z" of fresh noise; "moving" if step i draws with key step + i.
    """

    def __init__(
        self,
        x: Tensor,
        names: Sequence[str],
        steps: Sequence[Sequence[Row]],
        *,
        inside: Sequence[Sequence[Row]] | None = None,
        weight: Tensor | None = None,
        guide: str | None = None,
        guidance: Sequence[Sequence[float]] | None = None,
        noise: str | None = None,
    ):
        names = [*names, *(["g"] if guide else []), *(["z"] if noise else [])]
        kind = {"dtype": accumulator(x.dtype), "device": x.device}
        self.coefs = _table(names, steps, weight).to(**kind)
        self.inside = None if inside is None else _table(names, inside, weight).to(**kind)
        self.guide = guide
        self.guidance = torch.tensor(guidance, dtype=torch.float64).to(**kind) if guide else None
        self.index = torch.arange(len(steps), device=x.device)
        self.moving = noise != "fixed"

    def __call__(
        self,
        step: int,
        tensors: Sequence[Tensor],
        *,
        mask: Tensor | None = None,
        keys: Tensor | None = None,
        out: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        coefs, inside, guidance, at = self.coefs, self.inside, self.guidance, self.index[step]
        if not self.moving:
            coefs, inside, guidance = (None if t is None else t[step] for t in (coefs, inside, guidance))
            at = None
        return combine(
            tensors,
            coefs,
            guide=self.guide,
            guidance=guidance,
            mask=mask,
            inside=None if mask is None else inside,
            keys=keys,
            step=at,
            out=out,
        )


def _columns(names: Sequence[str], guided: bool) -> list[str]:
    """The names of the columns: "v" is u and c side by side, unless they stand in the names themselves."""
    if not guided or "u" in names:
        return list(names)
    return [column for name in names for column in (("u", "c") if name == "v" else (name,))]


def _table(names: Sequence[str], steps: Sequence[Sequence[Row]], weight: Tensor | None) -> Tensor:
    """float64 `[steps, outputs, columns, *rows]`."""
    columns = _columns(names, weight is not None)
    known = {*columns, "v"}
    for rows in steps:
        for row in rows:
            assert row.keys() <= known, (row, known)
    values = [[[row.get(column, 0.0) for column in columns] for row in rows] for rows in steps]
    table = torch.tensor(values, dtype=torch.float64)
    if weight is None:
        return table
    v = torch.tensor([[row.get("v", 0.0) for row in rows] for rows in steps], dtype=torch.float64)
    v = v.reshape(*v.shape, *[1] * weight.ndim)
    table = table.reshape(*table.shape, *[1] * weight.ndim).repeat(1, 1, 1, *weight.shape)
    table[:, :, columns.index("u")] += v * (1 - weight)
    table[:, :, columns.index("c")] += v * weight
    return table


def weight_of(name: str, guidance: float | Tensor | None, x: Tensor) -> Tensor | None:
    """The scale of guidance, float64 `[]` or `[batch]` on the host."""
    if guidance is None:
        return None
    weight = torch.as_tensor(guidance, dtype=torch.float64, device="cpu")
    if weight.shape not in (torch.Size([]), x.shape[:1]):
        raise ValueError(f"{name}: guidance must be a number or [{len(x)}], got {list(weight.shape)}")
    return weight


def evaluate(name: str, velocity: Velocity, x: Tensor, sigma: Tensor, guided: bool) -> tuple[Tensor, ...]:
    """The velocity, or (uncond, cond) with guidance."""
    result = velocity(x, sigma)
    pair = isinstance(result, (tuple, list))
    if pair != guided or (pair and len(result) != 2):
        wanted = "a pair (uncond, cond), since guidance is given" if guided else "one tensor"
        got = f"a sequence of {len(result)}" if pair else type(result).__name__
        raise ValueError(f"{name}: velocity must return {wanted}, got {got}")
    result = tuple(result) if pair else (result,)
    for v in result:
        if not isinstance(v, Tensor) or v.shape != x.shape:
            got = list(v.shape) if isinstance(v, Tensor) else type(v).__name__
            raise ValueError(f"{name}: velocity must have the shape of x {list(x.shape)}, got {got}")
    return tuple(v.contiguous() for v in result)


def falling(name: str, sigmas: Tensor | Sequence[float]) -> list[float]:
    """Noise levels from at most 1 down to at least 0, strictly."""
    return _grid(name, sigmas, -1)


def rising(name: str, sigmas: Tensor | Sequence[float]) -> list[float]:
    """Noise levels from at least 0 up to at most 1, strictly."""
    return _grid(name, sigmas, 1)


def _grid(name: str, sigmas: Tensor | Sequence[float], sign: int) -> list[float]:
    grid = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    way = "rise" if sign > 0 else "fall"
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"{name}: sigmas must be [steps + 1] with a step or more, got {list(grid.shape)}")
    if not ((grid >= 0) & (grid <= 1)).all() or not (sign * grid.diff() > 0).all():
        raise ValueError(f"{name}: sigmas must {way} strictly within 0 .. 1, got {grid.tolist()}")
    return grid.tolist()


def levels(grid: Sequence[float], x: Tensor, batch: int | None = None) -> Tensor:
    """`[len(grid), batch]` in the dtype of x and on its device: what the velocity is given, row by row."""
    table = torch.tensor(grid, dtype=x.dtype, device=x.device)
    return table[:, None].expand(-1, len(x) if batch is None else batch).contiguous()


def like(name: str, what: str, t: Tensor, x: Tensor) -> Tensor:
    """t broadcast to x, in its dtype and on its device, contiguous."""
    try:
        return t.to(x).expand(x.shape).contiguous()
    except RuntimeError:
        raise ValueError(f"{name}: {what} must broadcast to x {list(x.shape)}, got {list(t.shape)}") from None


def one_of(name: str, what: str, value: str | None, known: Sequence[str | None]) -> None:
    if value not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"{name}: {what} must be one of {names}, got {value!r}")


def finite(name: str, what: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name}: {what} must be finite, got {value}")
