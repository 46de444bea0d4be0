"""Adapters into the slots of layers, changes into parameters, and out again."""

from dataclasses import dataclass, replace

from torch import nn

from rfkernels.adapters.base import Adapter, Factors
from rfkernels.adapters.names import modules
from rfkernels.adapters.records import Patch, Record
from rfkernels.adapters.state import Layer, Patched, State, write_columns
from rfkernels.adapters.timestep import TimestepLoRA
from rfkernels.nn.lora import LoRALinear

__all__ = ["Part", "change", "check_room", "place", "remove"]


@dataclass(frozen=True)
class Part:
    """What one layer is to get."""

    factors: Factors | None
    extra: Adapter | None
    record: Record

    @property
    def rank(self) -> int:
        return 0 if self.factors is None else len(self.factors.down)


def _free(layer: Layer, rank: int) -> int | None:
    ranks = layer.layer.ranks
    return next((i for i, n in enumerate(layer.slots) if n is None and ranks[i] >= rank), None)


def check_room(state: State, path: str, part: Part) -> None:
    """Refuses an adapter that no free slot can hold, where slots are reserved."""
    layer, reserve = state.layers.get(path), state.reserve
    if reserve is None:
        return
    if layer is None:
        if reserve[1] is not None and part.rank > reserve[1]:
            raise ValueError(
                f"load_lora: rank of {path} must be at most max_rank {reserve[1]}, got {part.rank}"
            )
    elif None not in layer.slots:
        raise ValueError(
            f"load_lora: a free slot of {path} required, all {len(layer.slots)} are taken by "
            f"{', '.join(map(str, layer.slots))}"
        )
    elif _free(layer, part.rank) is None:
        ranks = [r for n, r in zip(layer.slots, layer.layer.ranks, strict=True) if n is None]
        raise ValueError(
            f"load_lora: rank of {path} must be at most {max(ranks)}, its slot's, got {part.rank}"
        )


def place(state: State, path: str, part: Part, name: str) -> None:
    """Loads an adapter into a slot of a layer, which is wrapped if it is not yet."""
    layer = state.layers.get(path)
    if layer is None:
        original = modules(state.model)[path]
        count, rank = state.reserve or (1, None)
        wrapped = LoRALinear(original, [part.rank if rank is None else rank] * count)
        layer = state.layers[path] = Layer(wrapped, original, [None] * count)
        state.put(path, wrapped)
    if part.record.inputs is not None and part.record.inputs > layer.layer.in_features:
        _widen(state, path, layer, part.record.inputs)
    slot = _free(layer, part.rank)
    if slot is None:
        slot = layer.layer.add_slot(part.rank)
        layer.slots.append(None)
    layer.slots[slot] = name
    if part.factors is not None:
        missing = layer.layer.in_features - part.factors.down.shape[1]
        down = nn.functional.pad(part.factors.down, (0, missing))
        layer.layer.load(slot, replace(part.factors, down=down))
    if part.extra is not None:
        layer.layer.load_extra(slot, part.extra)
    if isinstance(part.record.item, TimestepLoRA):
        layer.timed[name] = part.record.item.to(layer.layer.unit.device)
        write_columns(layer.layer, layer.layer.columns(slot).start, layer.layer.unit.new_zeros(part.rank))


def _widen(state: State, path: str, layer: Layer, inputs: int) -> None:
    """The layer with more inputs, whose weights are zero (control LoRAs read more channels)."""
    base = layer.layer.base
    wide = nn.Linear(
        inputs, base.out_features, bias=False, device=base.weight.device, dtype=base.weight.dtype
    )
    wide.weight.zero_()
    wide.weight[:, : base.in_features] = base.weight
    wide.weight.requires_grad_(base.weight.requires_grad)
    wide.bias, wide.before_widening = base.bias, base.in_features
    layer.layer.widen(wide)
    config = getattr(state.model, "config", {})
    if hasattr(state.model, "register_to_config") and config.get("in_channels") == base.in_features:
        state.config.setdefault("in_channels", base.in_features)
        state.model.register_to_config(in_channels=inputs)


def change(state: State, patch: Patch, name: str) -> None:
    """Notes a change of a parameter, whose value is kept; `State.write` makes it."""
    path, _, parameter = patch.path.rpartition(".")
    if patch.path not in state.patched:
        module = modules(state.model)[path]
        original = module._parameters[parameter].detach().clone()
        state.patched[patch.path] = Patched(module, parameter, original)
    patches = state.patched[patch.path].patches
    if name in patches:
        if patch.replaces or patches[name].replaces:
            raise ValueError(f"load_lora: {patch.path} must be replaced or changed, got both")
        patch = replace(patch, value=patches[name].value + patch.value)
    patches[name] = patch


def remove(state: State, name: str) -> None:
    """Empties the slots of an adapter and undoes its changes; layers without adapters are restored."""
    for path, layer in list(state.layers.items()):
        slot = layer.slot_of(name)
        if slot is not None:
            layer.layer.clear(slot)
            layer.slots[slot] = None
            layer.timed.pop(name, None)
        if not any(layer.slots) and not state.reserve:
            state.restore(path)
    for path, patched in list(state.patched.items()):
        if patched.patches.pop(name, None) is not None and not patched.patches:
            patched.write({})
            del state.patched[path]
    del state.strengths[name]
