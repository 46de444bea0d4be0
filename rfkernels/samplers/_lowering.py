"""Lowering: from the stages of a plan to launches of `ops.combine`, with all coefficients on the device.

On the way every tensor's life is followed: what no later stage reads is neither written nor held.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rfkernels.ops._register import accumulator
from rfkernels.samplers._rows import Form, Row, form_values, nonzero, same, same_form
from rfkernels.samplers.guidance import Guide, Use, third_of

if TYPE_CHECKING:
    from rfkernels.samplers.plan import Plan, Stage

__all__ = ["Launch", "Lowered", "Runtime", "lower"]

_MAX_INPUTS, _MAX_OUTPUTS = 8, 3  # of one combine
_EVALUATED = ("v", "uncond", "cond", "third")


@dataclass
class Launch:
    """One call of `ops.combine`: names of its tensors and results, and its arguments on the device."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    guide: str | None
    noisy: bool
    coefs: Tensor | None = None
    parameters: Tensor | None = None
    keys: Tensor | None = None


@dataclass(frozen=True)
class Lowered:
    """A stage as it runs.

    Attributes:
        velocities: which of uncond, cond, third are wanted; cond alone where nothing guides.
        names: what they are called in the launches.
        launches: one, unless it has more than three results.
        keeps, aliases: (name, source) of references to what there was, and to results.
        alive: the names that the memory has after it.
        held: the names whose tensors must not be overwritten by it.
    """

    velocities: tuple[str, ...]
    names: tuple[str, ...]
    launches: tuple[Launch, ...]
    keeps: tuple[tuple[str, str], ...]
    aliases: tuple[tuple[str, str], ...]
    alive: tuple[str, ...]
    held: tuple[str, ...]
    noisy: bool


@dataclass(frozen=True)
class Runtime:
    """All stages of a plan, and the noise levels of their evaluations on the device."""

    stages: tuple[Lowered, ...]
    levels: Tensor
    guide_velocities: int  # 0 without a guide


@dataclass
class _Draft:
    """A stage on its way: its use of the guide, writes without references, keeps."""

    use: Use
    writes: dict[str, Form]
    noise: dict[str, Row]
    keeps: dict[str, str]
    alive: set[str] = field(default_factory=set)


def lower(
    plan: "Plan",
    x: Tensor,
    guide: Guide | None,
    keys: Tensor | None,
    extra: Mapping[str, Tensor],
    preview: bool,
) -> Runtime:
    """The launches of `plan` for states like x; `keys` None: noise is a tensor called "noise"."""
    drafts = _drafts(plan, guide, preview)
    _follow_lives(plan, drafts, {"x", *extra})
    lowered, tables = [], []
    unlike = {name for name, t in extra.items() if t.dtype != x.dtype}  # whose dtype may not be that of x
    for index, (stage, draft) in enumerate(zip(plan.stages, drafts, strict=True)):
        result, rows = _lowered(stage, draft, unlike, keys is not None)
        unlike = {n for n, source in draft.keeps.items() if source in unlike | {"v"}} | (unlike & draft.alive)
        unlike -= draft.writes.keys()
        lowered.append(result)
        tables += rows
        for launch in result.launches:
            if launch.noisy:
                launch.keys = keys + torch.tensor([0, 0, 1 + index], device=keys.device)
    launches = [launch for stage in lowered for launch in stage.launches]
    dtype = accumulator(x.dtype)
    flat = np.concatenate([table.reshape(-1) for table in tables]) if tables else np.zeros(0)
    parts = torch.from_numpy(flat).to(dtype).to(x.device).split([table.size for table in tables])
    for launch, part, table in zip(launches, parts, tables, strict=True):
        launch.coefs = part.view(table.shape)
    _set_parameters(plan, drafts, lowered, x)
    return Runtime(tuple(lowered), _levels(plan, x), 0 if guide is None else guide.velocities)


def _drafts(plan: "Plan", guide: Guide | None, preview: bool) -> list[_Draft]:
    drafts: list[_Draft] = []
    remembers, begins = False, True
    for stage in plan.stages:
        use = guide.at(stage.sigma, stage.step, plan.steps) if guide else Use(None)
        writes = {name: form_values(form) for name, form in stage.writes.items()}
        keeps = dict(stage.keeps)
        if preview and begins:
            writes["x0"] = form_values({"x": 1.0, "v": -_value(stage.sigma)})
        if use.kind is not None:  # the guided velocity is nowhere yet
            for name in [n for n, source in keeps.items() if source == "v"]:
                del keeps[name]
                writes[name] = {"v": 1.0}
            if guide.momentum and use.kind == "apg":
                writes["momentum"] = {"cond": 1.0, "uncond": -1.0}
                if remembers:
                    use = Use("apg_momentum", (*use.parameters, guide.momentum))
                    writes["momentum"]["momentum"] = guide.momentum
        remembers, begins = "momentum" in writes, stage.ends
        drafts.append(_Draft(use, writes, {k: _value(v) for k, v in stage.noise.items()}, keeps))
    return drafts


def _follow_lives(plan: "Plan", drafts: list[_Draft], given: set[str]) -> None:
    """Drops the writes and keeps that nobody reads, and notes what is alive after each stage."""
    needed: set[str] = {"x", *plan.outputs}
    for stage, draft in zip(reversed(plan.stages), reversed(drafts), strict=True):
        if stage.ends:
            needed |= {stage.result, "x0"}
        draft.alive = needed | {"x"}
        draft.writes = {n: form for n, form in draft.writes.items() if n in draft.alive}
        draft.keeps = {n: source for n, source in draft.keeps.items() if n in draft.alive}
        made = draft.writes.keys() | draft.keeps.keys()
        read = {name for form in draft.writes.values() for name in form} | set(draft.keeps.values())
        if draft.use.kind == "apg_momentum" and any("v" in form for form in draft.writes.values()):
            read.add("momentum")
        needed = (draft.alive - made | read | {"x"}) - set(_EVALUATED)
    known = given
    for stage, draft in zip(plan.stages, drafts, strict=True):
        draft.alive &= known | draft.writes.keys() | draft.keeps.keys()
        missing = {n for form in draft.writes.values() for n in form} - known - set(_EVALUATED)
        if missing or not set(draft.keeps.values()) <= known | {"v"}:
            raise ValueError(f"{plan.name}: step {stage.step} reads {sorted(missing)}, which nothing wrote")
        known = draft.alive


def _lowered(
    stage: "Stage", draft: _Draft, unlike: set[str], philox: bool
) -> tuple[Lowered, list[np.ndarray]]:
    kind, forms = draft.use.kind, dict(draft.writes)
    if kind is None:
        velocities, names = ("cond",), ("v",)
    else:
        from_model = third_of(kind) and kind != "apg_momentum"
        velocities = names = ("uncond", "cond", "third")[: 3 if from_model else 2]
    aliases: dict[str, str] = {}
    for name in list(forms):
        twin = next(
            (n for n in forms if n != name and n not in aliases and _twins(n, name, forms, draft)), None
        )
        if twin is not None:
            aliases[name] = twin
            del forms[name]
    outputs = list(forms)
    launches, tables = [], []
    for part in [outputs[i : i + _MAX_OUTPUTS] for i in range(0, len(outputs), _MAX_OUTPUTS)]:
        noise = {n: draft.noise[n] for n in part if nonzero(draft.noise.get(n, 0.0))}
        launch, table = _launch(stage, kind, names, {n: forms[n] for n in part}, noise, unlike, philox)
        launches.append(launch)
        tables.append(table)
    made = set(forms) | set(aliases) | set(draft.keeps)
    held = (draft.alive - made) | set(draft.keeps.values())
    if len(launches) > 1:
        held |= {name for launch in launches for name in launch.inputs}
    noisy = any(nonzero(std) for name, std in draft.noise.items() if name in draft.writes)
    keeps, alive = tuple(draft.keeps.items()), tuple(sorted(draft.alive))
    order = (tuple(launches), keeps, tuple(aliases.items()), alive, tuple(sorted(held)), noisy)
    return Lowered(velocities, names, *order), tables


def _twins(a: str, b: str, forms: Mapping[str, Form], draft: _Draft) -> bool:
    same_noise = same(draft.noise.get(a, 0.0), draft.noise.get(b, 0.0))
    return same_noise and same_form(forms[a], forms[b])


def _launch(
    stage: "Stage",
    kind: str | None,
    names: tuple[str, ...],
    forms: dict[str, Form],
    noise: dict[str, Row],
    unlike: set[str],
    philox: bool,
) -> tuple[Launch, np.ndarray]:
    """The launch that writes `forms`, and its table of coefficients [outputs, columns, *rows]."""
    read = {name for form in forms.values() for name in form}
    guided = kind is not None and "v" in read
    remembered = sorted(read - set(_EVALUATED), key=lambda n: (n != "x", n in unlike, n))
    evaluated = [n for n in names if guided or n in read]
    if guided and kind == "apg_momentum":
        evaluated.append("momentum")
        remembered = [n for n in remembered if n != "momentum"]
    alone = "cond" in read and not guided  # terms in the order of a guided launch
    if not remembered or remembered[0] in unlike or (alone and remembered[0] != "x"):
        remembered.insert(0, "x")  # the first gives the results their dtype
    inputs = [remembered[0], *evaluated, *remembered[1:]]
    drawn = [] if philox or not noise else ["noise"]
    inputs += drawn
    if len(inputs) > _MAX_INPUTS:
        raise ValueError(
            f"step {stage.step} combines {len(inputs)} tensors, at most {_MAX_INPUTS}: {', '.join(inputs)}"
        )
    columns = [*inputs, *(["v"] if guided else []), *(["noise"] if noise and philox else [])]
    entries = [
        [form.get(c, 0.0) if c != "noise" else noise.get(name, 0.0) for c in columns]
        for name, form in forms.items()
    ]
    arrays = [np.shape(e) for row in entries for e in row if not isinstance(e, float)]
    shape = np.broadcast_shapes(*arrays)
    if shape:
        entries = [[np.broadcast_to(e, shape) for e in row] for row in entries]
    launch = Launch(tuple(inputs), tuple(forms), kind if guided else None, bool(noise) and philox)
    return launch, np.array(entries, dtype=np.float64)


def _set_parameters(plan: "Plan", drafts: list[_Draft], lowered: list[Lowered], x: Tensor) -> None:
    """The guide's parameters on the device; stages with equal ones share a tensor."""
    dtype = accumulator(x.dtype)
    seen: dict[tuple, Tensor] = {}
    for draft, stage in zip(drafts, lowered, strict=True):
        for launch in stage.launches:
            if launch.guide is None:
                continue
            key = tuple(id(p) if isinstance(p, Tensor) else p for p in draft.use.parameters)
            if key not in seen:
                seen[key] = _parameters(draft.use.parameters, dtype, x.device)
            launch.parameters = seen[key]


def _parameters(parameters: tuple[float | Tensor, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if not any(isinstance(p, Tensor) for p in parameters):
        return torch.tensor(parameters, dtype=dtype, device=device)
    tensors = [torch.as_tensor(p, dtype=dtype, device=device) for p in parameters]
    return torch.stack(torch.broadcast_tensors(*tensors))


def _levels(plan: "Plan", x: Tensor) -> Tensor:
    """[stages, batch] or [stages, *rows]."""
    if not plan.stages:
        return x.new_zeros(0)
    values = [_value(stage.sigma) for stage in plan.stages]
    shapes = {np.shape(v) for v in values}
    if shapes == {()}:
        rows = np.array(values, dtype=np.float64)[:, None]
    else:
        shape = np.broadcast_shapes(*shapes)
        rows = np.stack([np.broadcast_to(v, shape) for v in values])
    levels = torch.from_numpy(np.ascontiguousarray(rows)).to(x.dtype).to(x.device)
    return levels.expand(len(values), len(x), *levels.shape[2:]).contiguous()


def _value(row: Row) -> Row:
    return row.numpy() if isinstance(row, Tensor) else row
