"""The regions between the linear layers of a block: norm and modulation, gated residual, both, codes of both.

Tables are inputs, a row for the one sample. Eager peers are the lines that models write.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import DTYPES, STEP, Case, nbytes, quantize, random_tensor, tolerance, values

# tokens, width: Wan 1.3B and SD3.5 medium are 1536 wide, FLUX.1 3072; the least stays in a cache
SIZES = [(64, 1536), (1024, 1536), (4608, 1536), (4608, 3072)]
QUICK = [(1024, 1536)]
EPS = 1e-6


@dataclass(frozen=True)
class Make:
    """Cases of tokens `[1, rows, width]` beside tables `[1, width]`."""

    rows: int
    width: int
    device: str
    dtypes: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtypes][0]

    @property
    def token_bytes(self) -> int:
        """Of one tensor of tokens."""
        return nbytes(self.rows * self.width, self.dtype)

    def case(
        self,
        op: str,
        formula: Callable[..., Tensor | tuple[Tensor, ...]],
        ours: Callable[..., Tensor | tuple[Tensor, ...]],
        *,
        tokens: int,
        tables: int,
        results: int = 1,
        written: int | None = None,
        tables_dtype: torch.dtype | None = None,
        **other: object,
    ) -> Case:
        """formula and ours take `tokens` tensors of tokens and `tables` tables; the results are `results` of
        the former, or `written` bytes."""
        one, table = (1, self.rows, self.width), (1, self.width)
        tables_dtype = tables_dtype or self.dtype
        written = results * self.token_bytes if written is None else written
        return Case(
            room="norm",
            op=op,
            label=f"{self.rows} x {self.width}",
            shape=one if results == 1 else (results, *one),
            dtypes=self.dtypes,
            bytes_moved=tokens * self.token_bytes + nbytes(tables * self.width, tables_dtype) + written,
            inputs=lambda: (
                *(random_tensor(one, self.dtype, self.device, seed) for seed in range(tokens)),
                *(random_tensor(table, tables_dtype, self.device, 10 + seed) for seed in range(tables)),
            ),
            ours=ours,
            formula=formula,
            **({"tolerance": tolerance(self.dtypes)} | other),
        )


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    """The room's cases; Wan keeps float32 tables beside its bfloat16 tokens."""
    for rows, width in QUICK if quick else SIZES:
        if not quick:
            yield from _regions(Make(rows, width, device, "f32"))
        make = Make(rows, width, device, "bf16")
        yield from _regions(make)
        yield _norm_modulate(make, torch.float32)
        yield from _codes(make)


# --- the lines of models ---


def _layer(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def _wan(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return _layer(x.float(), scale, shift).type_as(x)


def _residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * y


def _sandwich(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor) -> Tensor:  # Lumina-Image 2, Z-Image
    return x + gate.tanh()[:, None] * F.rms_norm(y, y.shape[-1:], weight[0], EPS)


def _residual_norm(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    x = _residual(x, y, gate)
    return x, _layer(x, scale, shift)


# --- the cases ---


def _norm_modulate(make: Make, tables: torch.dtype | None = None) -> Case:
    from rfkernels.ops import norm_modulate

    return make.case(
        "norm_modulate, f32 tables" if tables else "norm_modulate",
        _wan if tables else _layer,
        lambda out, x, scale, shift: norm_modulate(x, scale, shift, out=out),
        tokens=1,
        tables=2,
        tables_dtype=tables,
        formula_out=None if tables else _layer_out,
    )


def _layer_out(out: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    torch.mul(F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale[:, None], out=out)
    return out.add_(shift[:, None])


def _regions(make: Make) -> Iterator[Case]:
    from rfkernels.ops import gated_residual, gated_residual_norm_modulate

    yield _norm_modulate(make)
    yield make.case(
        "gated_residual",
        _residual,
        lambda out, x, y, gate: gated_residual(x, y, gate, out=out),
        tokens=2,
        tables=1,
        formula_out=lambda out, x, y, gate: torch.addcmul(x, gate[:, None], y, out=out),
    )
    yield make.case(
        "gated_residual, rms and tanh",
        _sandwich,
        lambda out, x, y, gate, weight: gated_residual(
            x, y, gate, gate_activation="tanh", branch_norm="rms", branch_weight=weight[0], out=out
        ),
        tokens=2,
        tables=2,
    )

    def both(out: Tensor | None, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return gated_residual_norm_modulate(*inputs, out=None if out is None else tuple(out.unbind(0)))

    def both_out(out: Tensor, x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        torch.addcmul(x, gate[:, None], y, out=out[0])
        _layer_out(out[1], out[0], scale, shift)
        return out

    name = "gated_residual_norm_modulate"
    yield make.case(name, _residual_norm, both, tokens=2, tables=3, results=2, formula_out=both_out)
    yield _backward(make)


def _backward(make: Make) -> Case:
    """The gradients of x, scale and shift, from x alone: the peer makes the statistics anew too."""
    from rfkernels.ops._norm_gradients import norm_modulate_backward

    def formula(grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        n, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)
        dn = grad * (1 + scale[:, None])
        no_affine = (None, None, [True, False, False])
        dx = torch.ops.aten.native_layer_norm_backward(dn, x, x.shape[-1:], mean, rstd, *no_affine)[0]
        return dx, (grad * n).sum(1), grad.sum(1)

    def ours(out: None, grad: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        needs = (True, True, True, *[False] * 6)
        region = (x, scale, scale, None, None, None)  # of the shift the shape counts
        return norm_modulate_backward(grad, needs, *region, "layer", EPS, "fast")[:3]

    return make.case(
        "norm_modulate_backward",
        formula,
        ours,
        tokens=2,
        tables=1,
        written=make.token_bytes + nbytes(2 * make.width, make.dtype),
        has_out=False,
        value=lambda dx, *sums: torch.cat([dx.flatten(), *[s.flatten() / make.rows**0.5 for s in sums]]),
    )


def _codes(make: Make) -> Iterator[Case]:
    """bfloat16 tokens to codes."""
    from rfkernels.ops import gated_residual_norm_modulate_quantize, norm_modulate_quantize, rotation_matrix

    code_bytes = make.rows * (make.width + 4)  # and a float32 scale per row
    for format, rotation in (("int8", 0), ("fp8", 0), ("int8", 256)):
        matrix = rotation_matrix(rotation).to(make.device, make.dtype) if rotation else None
        yield make.case(
            f"norm_modulate_quantize {format}" + (f", rotation {rotation}" if rotation else ""),
            lambda x, scale, shift, format=format, matrix=matrix: quantize(
                _layer(x, scale, shift), format, matrix
            ),
            lambda out, x, scale, shift, format=format, rotation=rotation: norm_modulate_quantize(
                x, scale, shift, format=format, rotation=rotation
            ),
            tokens=1,
            tables=2,
            written=code_bytes,
            has_out=False,
            value=values,
            tolerance=STEP[format],
        )

    def both(x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        x, n = _residual_norm(x, y, gate, scale, shift)
        return x, *quantize(n, "int8")

    yield make.case(
        "gated_residual_norm_modulate_quantize int8",
        both,
        lambda out, *inputs: gated_residual_norm_modulate_quantize(*inputs),
        tokens=2,
        tables=3,
        written=make.token_bytes + code_bytes,
        has_out=False,
        value=lambda x, *codes: torch.stack([x.float(), values(*codes)]),
        tolerance=STEP["int8"],
    )
