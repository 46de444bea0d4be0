"""Named steps of samplers and editors, each one `combine`: against the formula as one writes it in torch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import DTYPES, MODELS, SIZES, Case, nbytes, random_tensor

Outputs = Tensor | tuple[Tensor, ...]
S, S2, W = 0.6, 0.45, 4.0  # sigma from and to, guidance
H = S2 - S


@dataclass(frozen=True)
class Step:
    """What a step reads after the state, its coefficients, and the formula in plain torch."""

    tensors: int  # besides the state
    rows: tuple[tuple[float, ...], ...]  # of the results over tensors, guided velocity, noise
    formula: Callable[..., Outputs]
    guide: str | None = None
    guidance: tuple[float, ...] = ()
    inside: tuple[tuple[float, ...], ...] | None = None  # with a mask, the last tensor
    noisy: bool = False


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))


def _zero_star(x: Tensor, u: Tensor, c: Tensor) -> Tensor:
    u = _dot(c.float(), u.float()) / (_dot(u.float(), u.float()) + 1e-8) * u
    return x + H * (u + W * (c - u))


def _apg(x: Tensor, u: Tensor, c: Tensor) -> Tensor:
    d, wide = (c - u).float(), c.float()
    d = d * torch.clamp(15.0 / _dot(d, d).sqrt(), max=1.0)
    parallel = _dot(d, wide) / _dot(wide, wide) * wide
    return x + H * (u + W * (d - parallel + 0.5 * parallel))


def _rescale(x: Tensor, u: Tensor, c: Tensor) -> Tensor:
    g, dims = u + W * (c - u), list(range(1, x.ndim))
    ratio = c.float().std(dims, keepdim=True) / g.float().std(dims, keepdim=True)
    return x + H * (0.7 * g * ratio + 0.3 * g)


def _token_norm(x: Tensor, u: Tensor, c: Tensor) -> Tensor:
    g = u + W * (c - u)
    return x + H * (g * (c.float().norm(dim=-1, keepdim=True) / g.float().norm(dim=-1, keepdim=True)))


def _dpmpp(x: Tensor, v: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    x0 = x - S * v
    return S2 / S * x + (1 - S2 / S) * (x0 + 0.5 * (x0 - old)), x0


def _unipc(x: Tensor, v: Tensor, last: Tensor, m0: Tensor, m1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m = x - S * v
    corrected = 0.75 * last + 0.2 * m0 - 0.1 * (0.06 * (m1 - m0) + 0.48 * (m - m0))
    return 0.8 * corrected + 0.2 * m - 0.1 * 0.5 * (m0 - m), corrected, m


def _controlled(x: Tensor, v: Tensor, y: Tensor) -> Tensor:
    return x + H * (v + 0.9 * ((x - y) / S - v))


def _flowchef(x: Tensor, v: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    return x - mask * 0.5 * ((x - S * v) - y) + H * v


def _flowedit(z: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return z + H * ((a + 5.5 * (b - a)) - (c + 1.5 * (d - c)))


def _sde(x: Tensor, v: Tensor) -> Tensor:
    return x * 0.96 + v * -0.18 + 0.3 * torch.randn_like(x)


def _unipc_rows() -> tuple[tuple[float, ...], ...]:
    m = torch.tensor([1, -S, 0, 0, 0])
    last, m0, m1 = torch.eye(5)[2:]
    corrected = 0.75 * last + 0.2 * m0 - 0.1 * (0.06 * (m1 - m0) + 0.48 * (m - m0))
    predicted = 0.8 * corrected + 0.2 * m - 0.05 * (m0 - m)
    return tuple(tuple(row.tolist()) for row in (predicted, corrected, m))


STEPS = {
    "DPM-Solver++(2M)": Step(2, ((1.125, -0.225, -0.125), (1, -S, 0)), _dpmpp),
    "UniPC-2, corrected and predicted": Step(4, _unipc_rows(), _unipc),
    "CFG-Zero* and Euler": Step(2, ((1, 0, 0, H),), _zero_star, "zero_star", (W,)),
    "APG and Euler": Step(2, ((1, 0, 0, H),), _apg, "apg", (W, 0.5, 15.0)),
    "rescaled CFG and Euler": Step(2, ((1, 0, 0, H),), _rescale, "rescale", (W, 0.7)),
    "norm-matched CFG and Euler": Step(2, ((1, 0, 0, H),), _token_norm, "token_norm", (W,)),
    "RF-Inversion": Step(2, ((1 + 0.9 * H / S, 0.1 * H, -0.9 * H / S),), _controlled),
    "FlowChef, masked": Step(3, ((1, H, 0),), _flowchef, inside=((0.5, H + 0.5 * S, 0.5),)),
    "FlowEdit": Step(4, ((1, -4.5 * H, 5.5 * H, 0.5 * H, -1.5 * H),), _flowedit),
    "SDE": Step(1, ((0.96, -0.18, 0.3),), _sde, noisy=True),
}


FULL = [({"16M": SIZES["16M"]}, ("f32", "f32+bf16"))]
FULL += [({name: MODELS[name] for name in ("FLUX 1024x1024", "Wan 480p 81 frames")}, ("f32+bf16",))]
QUICK = [({"1M": SIZES["1M"]}, ("f32",))]


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    """Every step on plain sizes and on the latents of models."""
    for name, step in STEPS.items():
        for shapes, dtypes in QUICK if quick else FULL:
            for label, shape in shapes.items():
                for dtype in dtypes:
                    yield _case(name, step, label, shape, dtype, device)


def _case(name: str, step: Step, label: str, shape: tuple[int, ...], dtypes: str, device: str) -> Case:
    from rfkernels.ops import combine, noise_keys

    state, velocity = DTYPES[dtypes]
    kinds = [state] + [velocity] * step.tensors
    coefs = torch.tensor(step.rows, device=device)
    options = {}
    if step.guide:
        options = dict(guide=step.guide, guidance=torch.tensor(step.guidance, device=device))
    if step.noisy:
        options = dict(keys=noise_keys(0, shape[0], device=device))

    def ours(out: Tensor | None, *tensors: Tensor) -> Outputs:
        outs = None if out is None else [out]
        if step.inside is None:
            results = combine(tensors, coefs, **options, out=outs)
        else:
            inside = torch.tensor(step.inside, device=device)
            results = combine(tensors[:-1], coefs, mask=tensors[-1], inside=inside, out=outs)
        return results if len(results) > 1 else results[0]

    return Case(
        room="steps",
        op=name,
        label=label,
        shape=shape,
        dtypes=dtypes,
        bytes_moved=nbytes(torch.Size(shape).numel(), *kinds, *[state] * len(step.rows)),
        inputs=lambda: tuple(random_tensor(shape, kind, device, 3 + i) for i, kind in enumerate(kinds)),
        ours=ours,
        formula=step.formula,
        has_out=len(step.rows) == 1,
        # eager rounds every 16-bit difference
        tolerance=0.0 if step.noisy else 1e-4 if dtypes == "f32" else 0.5,
    )
