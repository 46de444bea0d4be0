r"""Steps as data: several linear combinations of the same tensors in one pass, guided, masked and noisy.

Every step of a sampler is :math:`o_j = \sum_k c_{jk} y_k`: the next state, and what later steps need of this
one. `combine` makes up to three of them and reads every tensor once. `moments` makes the sums that guidance,
log-probabilities and losses need.

The first tensor is float64, float32, float16 or bfloat16 and gives the dtype of the results; the others are
float64 beside a float64 one, else float32, float16 or bfloat16 each. All are contiguous and of one shape
`[batch, ...]`. Coefficients are row scalars as in `rfkernels.ops.solver`. Arithmetic is in float32 (float64
for float64 tensors), terms are summed from left to right, results round once. All raise ValueError for
tensors that do not fit together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rfkernels import _C
from rfkernels.ops._register import define, expand_rows
from rfkernels.ops._workspace import workspace_of
from rfkernels.ops.noise import philox_normal

__all__ = [
    "GUIDES",
    "combine",
    "combine_reference",
    "moments",
    "moments_reference",
    "stochastic_step",
    "stochastic_step_reference",
]

# How many tensors after the first a guide combines, and its parameters.
GUIDES: dict[str, tuple[int, tuple[str, ...]]] = {
    "cfg": (2, ("w",)),
    "skip_layer": (3, ("w", "s")),
    "zero_star": (2, ("w",)),
    "rescale": (2, ("w", "phi")),
    "apg": (2, ("w", "eta", "r")),
    "apg_momentum": (3, ("w", "eta", "r", "beta")),
    "perpendicular": (3, ("w", "n")),
    "token_norm": (2, ("w",)),
    "transport": (2, ("s", "inverse_sigma", "r")),
    "transport_matched": (2, ("s", "inverse_sigma", "r")),
}


def combine(
    tensors: Sequence[Tensor],
    coefs: Tensor,
    *,
    guide: str | None = None,
    guidance: Tensor | None = None,
    mask: Tensor | None = None,
    inside: Tensor | None = None,
    keys: Tensor | None = None,
    step: Tensor | None = None,
    out: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    r"""Returns :math:`o_j = \sum_k c_{jk} y_k + c_{jg}\,g + c_{jz}\,z` for one to three j.

    The columns of `coefs` are the tensors, then the guided velocity :math:`g` if there is a `guide`, then
    fresh normal noise :math:`z` if there are `keys`. Guides combine the tensors after the first; of `cfg` to
    `perpendicular` these are u (unconditional), c (conditional) and what is named third:

    ======================  ===========================================================================
    `cfg`                   :math:`g = (1-w)u + w c`
    `skip_layer`            the same `+ s (c - third)`, third: with layers skipped
    `zero_star`             :math:`g = \rho u + w (c - \rho u)`, :math:`\rho = <c,u> / (<u,u> + 10^{-8})`
    `rescale`               :math:`g' = (\phi\,std(c)/std(g) + 1 - \phi)\,g` of the `cfg` g
    `apg`                   :math:`g = u + w\min(1, r/|d|)(d - (1-\eta)(<d,c>/<c,c>)c)`, :math:`d = c - u`
    `apg_momentum`          the same with :math:`d = c - u + \beta\,third`, third: the last d
    `perpendicular`         :math:`g = u + w(p - n(q - (<q,p>/|p|^2)p))`, `p = c - u`, `q = third - u`
    `token_norm`            :math:`g' = g |c|/|g|` of the `cfg` g, for each row along the last axis
    `transport`             of the tensors x, v, y: :math:`g = v + s(d\min(1, r/|d|) - v)` with
                            :math:`d = (x - y)\,inverse\_sigma`, norms along the last axis
    `transport_matched`     the same, then d is given the norm of v
    ======================  ===========================================================================

    Products, norms and deviations are of each sample unless it says otherwise; where a divisor is
    0, the quotient is 0.

    Args:
        tensors: one to eight.
        coefs: `[outputs, columns, *rows]`; with `step` `[steps, outputs, columns, *rows]`.
        guide: a name of `GUIDES`.
        guidance: its parameters in the order of `GUIDES`, `[parameters]` or `[parameters, batch]`; with
            `step` after an axis of steps.
        mask: m, shaped like the tensors, floating: coefficients are `coefs + m (inside - coefs)`.
        inside: shaped like `coefs`.
        keys: `int64[batch, 3]`, see `noise_keys`; the step of the noise is that of the key plus `step`.
        step: `int64[]` on the device, which row of `coefs`, `inside` and `guidance` to use: a captured graph
            moves to the next step by adding one.
        out: where to write, one for each result; `tensors` allowed; no gradient then.
    """
    out = None if out is None else list(out)
    return tuple(_combine(list(tensors), coefs, mask, inside, keys, step, guide, guidance, out=out))


def combine_reference(
    tensors: Sequence[Tensor],
    coefs: Tensor,
    mask: Tensor | None,
    inside: Tensor | None,
    keys: Tensor | None,
    step: Tensor | None,
    guide: str | None,
    guidance: Tensor | None,
) -> list[Tensor]:
    """The definition of `combine` in plain torch."""
    if step is not None:
        coefs, inside, guidance = (None if t is None else t[step] for t in (coefs, inside, guidance))
        if keys is not None:
            keys = torch.cat([keys[:, :2], keys[:, 2:] + step], 1)
    dtype, x = coefs.dtype, tensors[0]
    columns = [t.to(dtype) for t in tensors]
    if guide:
        columns.append(_guided(columns, guide, guidance))
    if keys is not None:
        columns.append(philox_normal(x.shape, keys, dtype=dtype))
    outs = []
    for j in range(len(coefs)):
        rows = [expand_rows(c, x) for c in coefs[j]]
        if mask is not None:
            rows = [
                c + mask.to(dtype) * (expand_rows(i, x) - c) for c, i in zip(rows, inside[j], strict=True)
            ]
        outs.append(sum((c * y for c, y in zip(rows[1:], columns[1:], strict=True)), rows[0] * columns[0]))
    return [o.to(x.dtype) for o in outs]


def _guided(columns: list[Tensor], guide: str, guidance: Tensor) -> Tensor:
    if columns[0].ndim == 1:  # samples of one element
        return _guided([c[:, None] for c in columns], guide, guidance)[:, 0]
    x, u, c = columns[:3]
    dims = list(range(1, u.ndim))
    p = [expand_rows(v, u) for v in guidance]
    dot = lambda a, b: (a * b).sum(dims, keepdim=True)
    cfg = (1 - p[0]) * u + p[0] * c
    if guide == "cfg":
        return cfg
    if guide == "skip_layer":
        return cfg + p[1] * (c - columns[3])
    if guide == "zero_star":
        u = dot(c, u) / (dot(u, u) + 1e-8) * u
        return u + p[0] * (c - u)
    if guide == "rescale":
        ratio = _ratio(_deviation(c), _deviation(cfg))
        return (p[1] * ratio + 1 - p[1]) * cfg
    if guide.startswith("apg"):
        d = c - u + (p[3] * columns[3] if guide == "apg_momentum" else 0)
        s = _clip(p[2], dot(d, d).sqrt())
        return u + p[0] * s * (d - (1 - p[1]) * _ratio(dot(d, c), dot(c, c)) * c)
    if guide == "perpendicular":
        a, q = c - u, columns[3] - u
        return u + p[0] * (a - p[1] * (q - _ratio(dot(q, a), dot(a, a)) * a))
    if guide == "token_norm":
        return cfg * _ratio(_norm(c), _norm(cfg))
    if guide in ("transport", "transport_matched"):
        v, d = u, (x - c) * p[1]
        d = d * _clip(p[2], _norm(d))
        if guide == "transport_matched":
            d = d * _ratio(_norm(v), _norm(d))
        return v + p[0] * (d - v)
    raise ValueError(f"combine: guide must be one of {', '.join(GUIDES)}, got {guide!r}")


def _deviation(t: Tensor) -> Tensor:
    """The root of a sample's squared deviations from its mean."""
    flat = t.reshape(len(t), -1)
    centred = flat - flat.sum(1, keepdim=True) / max(1, flat.shape[1])
    return centred.square().sum(1).sqrt().view(-1, *[1] * (t.ndim - 1))


def _norm(t: Tensor) -> Tensor:
    return t.square().sum(-1, keepdim=True).sqrt()


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))


def _clip(r: Tensor, norm: Tensor) -> Tensor:
    return torch.where(norm > r, r / torch.where(norm > 0, norm, 1), 1)


def moments(tensors: Sequence[Tensor], coefs: Tensor) -> Tensor:
    r"""Returns per sample the sums and products of one to three combinations :math:`o_j = \sum_k c_{jk} y_k`.

    float64 `[batch, J + J(J+1)/2]`: :math:`\sum o_0, \dots, \sum o_{J-1}`, then
    :math:`<o_0,o_0>, <o_0,o_1>, \dots, <o_1,o_1>, \dots`. The combinations are made in float32 (float64),
    their products summed in a fixed order: the same bits at every run, for a sample alone or in a batch.

    Args:
        tensors: one to eight, as in `combine`.
        coefs: `[J, len(tensors), *rows]`, row scalars.
    """
    return _moments(list(tensors), coefs)


def moments_reference(tensors: Sequence[Tensor], coefs: Tensor) -> Tensor:
    """The definition of `moments` in plain torch."""
    outs = [sum(expand_rows(c, tensors[0]) * y for c, y in zip(row, tensors, strict=True)) for row in coefs]
    flat = [o.double().reshape(len(o), -1) for o in outs]
    pairs = [(flat[i] * flat[j]).sum(1) for i in range(len(flat)) for j in range(i, len(flat))]
    return torch.stack([f.sum(1) for f in flat] + pairs, 1)


def _combine_empty(tensors, coefs, mask, inside, keys, step, guide, guidance):
    outputs = coefs.shape[0 if step is None else 1] if coefs.ndim > (step is not None) else 0
    if not tensors or not 1 <= outputs <= 3:
        raise ValueError(
            "combine: expected 1..8 tensors and coefs [outputs, columns, *rows] with 1..3 outputs, got "
            f"{len(tensors)} tensors and coefs {list(coefs.shape)}"
        )
    return [torch.empty_like(tensors[0]) for _ in range(outputs)]


def _combine_kernel(outs, tensors, coefs, mask, inside, keys, step, guide, guidance):
    x = tensors[0]
    needed = guide in _SUMMED and x.ndim and x.is_contiguous()
    workspace = workspace_of(_C.combine_workspace(x), x.device) if needed else None
    _C.combine(
        outs[0], list(outs[1:]), tensors, coefs, mask, inside, keys, step, guide or "", guidance, workspace
    )


def _through(reference, grads, needs, args, tensors):
    """Gradients of `reference(tensors, *args)` for the tensors and what `needs` says of the rest."""
    with torch.enable_grad():
        wanted = [t.detach().requires_grad_() for t in tensors]
        rest = [
            a.detach().requires_grad_(bool(n)) if isinstance(a, Tensor) and a.is_floating_point() else a
            for a, n in zip(args, needs, strict=True)
        ]
        outs = reference(wanted, *rest)
        outs = [outs] if isinstance(outs, Tensor) else outs
        used = [(o, g) for o, g in zip(outs, grads, strict=True) if g is not None]
        inputs = wanted + [a for a in rest if isinstance(a, Tensor) and a.requires_grad]
        found = iter(
            torch.autograd.grad([o for o, _ in used], inputs, [g for _, g in used], allow_unused=True)
        )
    return [next(found) for _ in wanted], *[
        next(found) if isinstance(a, Tensor) and a.requires_grad else None for a in rest
    ]


def _combine_backward(grads, needs, *saved):
    *args, guide, guidance = saved[:7]
    args = [*args, guide, guidance]
    return _through(combine_reference, grads, needs[1:], args, saved[7:])


_SUMMED = ("zero_star", "rescale", "apg", "apg_momentum", "perpendicular")
_combine = define(
    "combine",
    "Tensor[] tensors, Tensor coefs, Tensor? mask, Tensor? inside, Tensor? keys, Tensor? step, str? guide, "
    "Tensor? guidance",
    _combine_kernel,
    _combine_empty,
    combine_reference,
    _combine_backward,
    saves=lambda out, tensors, *rest: (*rest, *tensors),
    outputs=None,
)


def _moments_empty(tensors, coefs):
    count = coefs.shape[0] if coefs.ndim else 0
    if not tensors or not tensors[0].ndim or not 1 <= count <= 3:
        raise ValueError(
            "moments: expected 1..8 tensors [batch, ...] and coefs [1..3, tensors, *rows], got "
            f"{[list(t.shape) for t in tensors]} and coefs {list(coefs.shape)}"
        )
    shape = (len(tensors[0]), count + count * (count + 1) // 2)
    return torch.empty(shape, dtype=torch.float64, device=tensors[0].device)


def _moments_kernel(out, tensors, coefs):
    x = tensors[0]
    if not x.numel():
        out.zero_()
    _C.moments(out, tensors, coefs, workspace_of(max(_C.combine_workspace(x), 16), x.device))


_moments = define(
    "moments",
    "Tensor[] tensors, Tensor coefs",
    _moments_kernel,
    _moments_empty,
    moments_reference,
    lambda grad, needs, coefs, *tensors: _through(moments_reference, [grad], needs[1:], [coefs], tensors),
    saves=lambda out, tensors, coefs: (coefs, *tensors),
)


def stochastic_step(tensors: Sequence[Tensor], coefs: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    r"""Returns :math:`x' = \sum_k c_k y_k + c_z z` and, per sample, two sums float64 `[batch, 2]`.

    Those of :math:`r = x' - \sum_k c_k y_k` and of its square with x' as it is stored, to the bit what
    `moments` gives of `[*tensors, x']` with coefficients `[-c, 1]`: all that a log-probability needs, without
    reading anything again. No gradient; see `sde_step` and `sde_log_prob`.

    Args:
        tensors: one to seven, as in `combine`.
        coefs: `[1, len(tensors) + 1, *rows]`, the last for the noise.
        keys: `int64[batch, 3]`, see `noise_keys`.
    """
    return _stochastic_step(list(tensors), coefs, keys)


def stochastic_step_reference(
    tensors: Sequence[Tensor], coefs: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition of `stochastic_step` in plain torch."""
    (mean,) = combine_reference([t.to(coefs.dtype) for t in tensors], coefs[:, :-1], *[None] * 6)
    z = philox_normal(mean.shape, keys, dtype=coefs.dtype)
    out = (mean + expand_rows(coefs[0, -1], mean) * z).to(tensors[0].dtype)
    residual = (out.to(coefs.dtype) - mean).double().reshape(len(out), -1)
    return out, torch.stack([residual.sum(1), residual.square().sum(1)], 1)


def _stochastic_step_empty(tensors, coefs, keys):
    x = tensors[0]
    return torch.empty_like(x), torch.empty((len(x), 2), dtype=torch.float64, device=x.device)


def _stochastic_step_kernel(out, sums, tensors, coefs, keys):
    if not out.numel():
        sums.zero_()
    workspace = workspace_of(max(_C.combine_workspace(out), 16), out.device)
    _C.stochastic_step(out, sums, tensors, coefs, keys, workspace)


_stochastic_step = define(
    "stochastic_step",
    "Tensor[] tensors, Tensor coefs, Tensor keys",
    _stochastic_step_kernel,
    _stochastic_step_empty,
    stochastic_step_reference,
    outputs=("out", "sums"),
)
