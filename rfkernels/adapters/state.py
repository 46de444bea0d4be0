"""What is loaded into a model: adapters by name, the layers and parameters they changed, the way back."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rfkernels.adapters.records import Patch
from rfkernels.adapters.timestep import TimestepLoRA
from rfkernels.nn.lora import LoRALinear

__all__ = ["Layer", "Patched", "State", "forget", "state_of", "write_columns"]

_ATTRIBUTE = "_rfkernels_adapters"
Strength = float | Tensor


@dataclass
class Layer:
    """A wrapped layer. `original` stands in its place again when nothing is loaded."""

    layer: LoRALinear
    original: nn.Module
    slots: list[str | None] = field(default_factory=list)
    timed: dict[str, TimestepLoRA] = field(default_factory=dict)

    def slot_of(self, name: str) -> int | None:
        return self.slots.index(name) if name in self.slots else None


@dataclass
class Patched:
    """A parameter of a module, a copy of what it was, and its changes by adapter."""

    module: nn.Module
    name: str
    original: Tensor
    patches: dict[str, Patch] = field(default_factory=dict)

    @torch.no_grad()
    def write(self, strengths: dict[str, Strength]) -> None:
        """W + sum_i w_i D_i, D_i = V - W for a V that replaces; rounded once, W where all w_i are 0."""
        parameter = self.module._parameters[self.name]
        active = [(float(strengths[n]), p) for n, p in self.patches.items() if float(strengths[n])]
        if not active:
            parameter.copy_(self.original)
            return
        if len(active) == 1 and active[0][0] == 1 and active[0][1].replaces:
            parameter.copy_(active[0][1].value)
            return
        start = self.original.to(parameter.device).double()
        total = start.clone()
        for strength, patch in active:
            value = patch.value.to(total)
            total += strength * (value - start if patch.replaces else value)
        parameter.copy_(total)


@dataclass
class State:
    """Everything of one model."""

    model: nn.Module
    strengths: dict[str, Strength] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    patched: dict[str, Patched] = field(default_factory=dict)
    reserve: tuple[int, int | None] | None = None  # slots and their rank, for every layer
    config: dict[str, object] = field(
        default_factory=dict
    )  # of the model, values that a widened input replaced
    merged: dict[str, dict[str, Tensor | None]] | None = None  # what base layers held before a merge

    def install(self, model: nn.Module) -> None:
        """Keeps the state with the model, out of its parameters and its file."""
        object.__setattr__(model, _ATTRIBUTE, self)

    def put(self, path: str, module: nn.Module) -> None:
        """Places a module in the model."""
        parent, _, name = path.rpartition(".")
        self.model.get_submodule(parent)._modules[name] = module

    def strengths_of(self, layer: Layer) -> Tensor:
        """[slots], or [batch, slots] where one strength is per sample."""
        like = layer.layer.unit
        given = [self.strengths.get(n, 0.0) if n else 0.0 for n in layer.slots]
        values = [v.to(like) if isinstance(v, Tensor) else like.new_tensor(v) for v in given]
        return torch.stack(torch.broadcast_tensors(*values), -1)

    def write(self) -> None:
        """Strengths into every layer and parameter."""
        for layer in self.layers.values():
            layer.layer.write(self.strengths_of(layer))
        for patched in self.patched.values():
            patched.write(self.strengths)

    def set_time(self, t: Strength, embedding: Tensor | None, shares: Tensor | None) -> None:
        """Coefficients of adapters with experts per time."""
        for layer in self.layers.values():
            for name, adapter in layer.timed.items():
                start = layer.layer.columns(layer.slot_of(name)).start
                write_columns(layer.layer, start, adapter.coefficients(t, embedding, shares))

    def restore(self, path: str) -> None:
        """The very module that stood there."""
        self.put(path, self.layers.pop(path).original)

    def check_strengths(self, strengths: dict[str, Strength]) -> None:
        """Differences of parameters have one strength for all samples."""
        for patched in self.patched.values():
            for name, patch in patched.patches.items():
                value = strengths.get(name, 0.0)
                if isinstance(value, Tensor) and value.ndim:
                    raise ValueError(
                        f"set_adapters: strength of {name} must be one number, since it changes {patch.path} "
                        f"for all samples, got {list(value.shape)}"
                    )


def write_columns(layer: LoRALinear, start: int, values: Tensor) -> None:
    """Coefficients `[n]` or `[batch, n]` of the columns from `start` on."""
    table = layer.coefficient if layer.coefficient.ndim == 1 else layer.coefficient[:, 0]
    if values.ndim > table.ndim:
        table = table.expand(len(values), -1)
    table = table.clone()
    table[..., start : start + values.shape[-1]] = values.to(table)
    layer.write(coefficient=table)


def state_of(model: nn.Module) -> State | None:
    """The state of a model with adapters."""
    return model.__dict__.get(_ATTRIBUTE)


def forget(model: nn.Module) -> None:
    """Removes the state; the model is what it was."""
    model.__dict__.pop(_ATTRIBUTE, None)
