"""Loading, switching and removing adapters of a model, reversible to the bit.

    report = load_lora(model, "style.safetensors", scale=0.8, name="style")
    load_lora(model, "detail.safetensors", name="detail")          # into the next slot of every layer
    set_adapters(model, ["style", "detail"], [0.6, 1.0])           # numbers on the device: no recompilation
    set_adapters(model, ["style", "detail"], torch.eye(2))         # sample 0 has one, sample 1 the other
    unload_lora(model)                                             # the very modules and bits of before

A strength w of an adapter that maps W to W' means W + w (W' - W), for every family. (For DoRA trainers
disagree at w != 1: PEFT scales s before the norm, LyCORIS scales k alone.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rfkernels.adapters.base import Adapter, Factors, weight_of
from rfkernels.adapters.files import read_lora
from rfkernels.adapters.names import modules
from rfkernels.adapters.place import Part, change, check_room, place, remove
from rfkernels.adapters.records import Dense, Patch, Record
from rfkernels.adapters.state import State, forget, state_of
from rfkernels.adapters.timestep import TimestepLoRA

__all__ = ["LoadReport", "load_lora", "loaded", "set_adapters", "set_time", "unload_lora"]


@dataclass(frozen=True)
class LoadReport:
    """What a file did to a model.

    Args:
        name: of the adapter.
        layers: what each layer got: "rank 16", "DoRA", "LoKr", ..
        parameters: those that were changed or replaced.
        unknown: keys that mean nothing for this model (strict=False).
        text_encoder: keys of text encoders, which are not part of the model.
    """

    name: str
    layers: dict[str, str]
    parameters: tuple[str, ...]
    unknown: tuple[str, ...]
    text_encoder: tuple[str, ...]


@torch.no_grad()
def load_lora(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    scale: float = 1.0,
    name: str | None = None,
    strict: bool = True,
    *,
    slots: int | None = None,
    max_rank: int | None = None,
    config: Mapping[str, object] | None = None,
) -> LoadReport:
    """Loads adapters of any dialect (adapters/files.py) into a model's linear layers, beside what is loaded.

    Args:
        model: any module whose layers are named as in the file; of diffusers also by the original names.
        source: a safetensors file, a folder of peft, or tensors by key.
        scale: the strength.
        name: of the adapter, by default `adapter_0`, `adapter_1`, ..
        strict: refuse a file with keys that mean nothing here; else they are listed in the report.
        slots, max_rank: reserve that many slots of that rank in every layer, so that later loads change no
            shape and recompile nothing. Without them a layer grows as adapters come.
        config: peft's hyperparameters (`r`, `lora_alpha`, ..) of tensors that come without.

    Raises:
        ValueError: unknown keys, all of them listed; factors that do not fit their layer, whose ranks differ
            or that are not finite; a rank above the slot's; a name that is taken. The model stays as it was.
    """
    state = state_of(model) or State(model)
    _refuse_merged(state, "load_lora")
    name = name or next(n for i in range(10**6) if (n := f"adapter_{i}") not in state.strengths)
    if name in state.strengths:
        raise ValueError(f"load_lora: name must be new, got {name}: unload_lora(model, {name!r}) first")
    contents = read_lora(source, model, config=config)
    if contents.unknown and strict:
        listed = "\n  ".join(contents.unknown)
        raise ValueError(f"load_lora: {len(contents.unknown)} keys mean nothing for this model:\n  {listed}")
    if not contents.records and not contents.patches:
        raise ValueError(f"load_lora: a file with adapters for this model required, got {source!s:.200}")
    parts, patches = _parts(state, contents.records, contents.patches)
    reserve = state.reserve
    try:
        if slots or max_rank:
            state.reserve = (slots or 1, max_rank)
        for path, part in parts.items():
            check_room(state, path, part)
        state.install(model)
        state.strengths[name] = scale
        for path, part in parts.items():
            place(state, path, part, name)
        for patch in patches:
            change(state, patch, name)
        state.check_strengths(state.strengths)
        state.write()
    except ValueError:
        state.reserve = reserve
        if name in state.strengths:
            unload_lora(model, name if len(state.strengths) > 1 else None)
        raise
    layers = {path: _described(part) for path, part in parts.items()}
    return LoadReport(name, layers, tuple(p.path for p in patches), contents.unknown, contents.text_encoder)


@torch.no_grad()
def set_adapters(
    model: nn.Module,
    names: str | Sequence[str],
    strengths: float | Tensor | Sequence[float | Tensor] = 1.0,
) -> None:
    """Writes the strengths of adapters; all that are not named are off.

    Args:
        names: one or more.
        strengths: one number for all; one per name, each a number or a tensor `[batch]`; or a tensor
            `[batch, names]`. Per sample: the first axis of a layer's tokens is the batch.
    """
    state = _state(model, "set_adapters")
    _refuse_merged(state, "set_adapters")
    names = [names] if isinstance(names, str) else list(names)
    missing = [n for n in names if n not in state.strengths]
    if missing:
        raise ValueError(f"set_adapters: names must be of {loaded(model)}, got {missing}")
    if isinstance(strengths, (int, float)):
        strengths = [strengths] * len(names)
    elif isinstance(strengths, Tensor):
        strengths = list(strengths.expand(len(names)) if strengths.ndim == 0 else strengths.unbind(-1))
    if len(strengths) != len(names):
        raise ValueError(
            f"set_adapters: one strength per name, got {len(names)} names, {len(strengths)} strengths"
        )
    given = dict(zip(names, strengths, strict=True))
    new = {n: given.get(n, 0.0) for n in state.strengths}
    state.check_strengths(new)
    state.strengths = new
    state.write()


@torch.no_grad()
def set_time(
    model: nn.Module, t: float | Tensor, embedding: Tensor | None = None, shares: Tensor | None = None
) -> None:
    """Writes the coefficients of adapters with experts per time (adapters/timestep.py), before a step.

    Args:
        t: in 0 .. 1, a number, or a tensor `[]` or `[batch]` on the device. Before the first call none is on.
        embedding: of t, `[.., e]`, for adapters with a router.
        shares: of the experts, `[.., J]`, instead of the adapters' own rule: `multiscale_coefficients`.
    """
    state = _state(model, "set_time")
    _refuse_merged(state, "set_time")
    state.set_time(t, embedding, shares)


@torch.no_grad()
def unload_lora(model: nn.Module, name: str | None = None) -> None:
    """Removes one adapter, or all of them: then every module and parameter is the one of before, bit for bit.

    With reserved slots a single adapter leaves its slot empty; else a layer without adapters is the
    original module again.
    """
    state = _state(model, "unload_lora")
    if name is None:
        from rfkernels.adapters.merge import unmerge_lora

        if state.merged is not None:
            unmerge_lora(model)
    elif name not in state.strengths:
        raise ValueError(f"unload_lora: name must be one of {loaded(model)}, got {name}")
    _refuse_merged(state, "unload_lora")
    if name is None:
        state.reserve = None
    for one in [name] if name else list(state.strengths):
        remove(state, one)
    if name is None or not (state.strengths or state.reserve):
        for path in list(state.layers):
            state.restore(path)
        if state.config:
            model.register_to_config(**state.config)
        forget(model)
    else:
        state.write()


def loaded(model: nn.Module) -> list[str]:
    """Names of the adapters of a model."""
    state = state_of(model)
    return [] if state is None else list(state.strengths)


# --- parts ---


def _state(model: nn.Module, call: str) -> State:
    state = state_of(model)
    if state is None:
        raise ValueError(f"{call}: a model with adapters required, none are loaded")
    return state


def _refuse_merged(state: State, call: str) -> None:
    if state.merged is not None:
        raise ValueError(f"{call}: adapters are merged into the weights, unmerge_lora(model) first")


def _parts(state: State, records, patches) -> tuple[dict[str, Part], list[Patch]]:
    """Adapters by layer, and changes of parameters; so are those of convolutions and the like."""
    layers, found, changes = modules(state.model), {}, []
    for record in _joined(records):
        layer, weight, bias = layers[record.path], None, None
        if isinstance(record.item, Adapter):
            weight, bias = _original(state, record.path, layer)
        if hasattr(layer, "in_features"):
            found[record.path] = _part(record, layer, weight, bias)
        else:
            changes.append(Patch(f"{record.path}.weight", record.item.merged(weight)[0], True))
    for patch in patches:
        path, _, name = patch.path.rpartition(".")
        if name in layers[path]._parameters:
            changes.append(patch)
        elif patch.replaces or path in found:
            kind = "replaced" if patch.replaces else "changed beside another adapter"
            raise ValueError(f"load_lora: {patch.path} must be a parameter to be {kind}, got {layers[path]}")
        else:
            record = Record(path, Dense({"diff": patch.value}))
            found[path] = _part(record, layers[path], None, None)
    for path, part in found.items():
        _check_layer(layers, path)
        changed = f"{path}.weight" in {*state.patched, *(p.path for p in changes)}
        if part.record.inputs is not None and (changed or not isinstance(layers[path], nn.Linear)):
            raise ValueError(
                f"load_lora: {path} is to be widened: an nn.Linear without other changes required"
            )
    return found, changes


def _check_layer(layers: dict[str, nn.Module], path: str) -> None:
    """Refuses a layer that the model does not call."""
    parent, _, name = path.rpartition(".")
    if getattr(layers[parent], "fused_projections", False) and name.split("_")[-1] in ("q", "k", "v", "proj"):
        raise ValueError(f"load_lora: {path} must be in use, unfuse_qkv_projections() first")


def _original(state: State, path: str, layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias without the changes of other adapters."""
    weight, bias = weight_of(layer)
    patched = state.patched.get(f"{path}.weight")
    return weight if patched is None else patched.original, bias


def _joined(records: Sequence[Record]) -> list[Record]:
    """One record per layer: a bias may come apart."""
    found: dict[str, Record] = {}
    for record in records:
        if record.path not in found:
            found[record.path] = record
            continue
        first, second = found[record.path], record
        if first.item is not None and second.item is not None:
            raise ValueError(f"load_lora: {record.path} must have one adapter, got two")
        keeper, other = (first, second) if first.item is not None else (second, first)
        biases = [b for b in (keeper.bias, other.bias) if b is not None]
        found[record.path] = replace(keeper, bias=sum(biases) if biases else None)
    return list(found.values())


def _part(record: Record, layer: nn.Module, weight: Tensor | None, bias: Tensor | None) -> Part:
    item, extra = record.item, None
    if isinstance(item, TimestepLoRA):
        item = item.factors_at(torch.ones_like(item.columns))
    elif isinstance(item, Adapter):
        extra, item = item, item.factors(weight, bias)
    if item is not None:
        extra = None
        if record.bias is not None:
            item = replace(item, bias=record.bias if item.bias is None else item.bias + record.bias)
    elif record.bias is not None or extra is None:
        none = record.bias.new_zeros(0, layer.in_features), record.bias.new_zeros(layer.out_features, 0)
        item = Factors(*none, bias=record.bias)
    return Part(item, extra, record)


def _described(part: Part) -> str:
    item = part.record.item
    if isinstance(item, Factors):
        return f"rank {part.rank}"
    return "bias" if item is None else type(item).__name__
