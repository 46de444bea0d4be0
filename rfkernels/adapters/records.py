"""From the tensors of one module in a file to adapters of a model's modules."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rfkernels.adapters.base import Adapter, Additive, Factors, check_weight, wide
from rfkernels.adapters.dialects import Alphas, Group
from rfkernels.adapters.dora import DoRA
from rfkernels.adapters.lora import LoRA
from rfkernels.adapters.lycoris import LoHa, LoKr
from rfkernels.adapters.names import Names, Target, bare
from rfkernels.adapters.timestep import TimestepLoRA
from rfkernels.ops._register import accumulator

__all__ = ["Dense", "Patch", "Record", "records_of"]


@dataclass(frozen=True)
class Record:
    """An adapter of one linear or convolution layer of a model.

    Args:
        path: the layer's name.
        item: the adapter; None where the file has a bias alone.
        bias: `[out]`, added to the layer's, times the strength.
        inputs: in_features that the layer must be widened to.
    """

    path: str
    item: Factors | Adapter | None
    bias: Tensor | None = None
    inputs: int | None = None


@dataclass(frozen=True)
class Patch:
    """A change of one parameter: added, or put in its place."""

    path: str
    value: Tensor
    replaces: bool = False


class Dense(Additive):
    """A full difference of a weight, `diff` `[out, in]`, beside a layer whose weight is not floating."""

    kind = "a weight difference"
    required = ("diff",)

    def delta(self, x: Tensor) -> Tensor:
        """x diff^T."""
        return wide(x) @ self.diff.to(accumulator(x.dtype)).T

    def merged(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """W + diff."""
        weight = check_weight(self.kind, weight, self.diff.shape)
        return weight + self.diff.to(weight.dtype), bias


def records_of(
    group: Group, targets: tuple[Target, ...], names: Names, alphas: Alphas
) -> tuple[list[Record | Patch], list[str]]:
    """What a group of tensors does to its targets, and the keys that have no part in it."""
    made = _Module(group, targets, names, alphas)
    records = [*made.timed(), *made.low_rank(), *made.lycoris(), *made.differences()]
    return records, [group.keys[role] for role in made.left]


class _Module:
    """One group while it is read; `left` are the roles not used yet."""

    def __init__(self, group: Group, targets: tuple[Target, ...], names: Names, alphas: Alphas) -> None:
        self.group, self.targets, self.names, self.alphas = group, targets, names, alphas
        self.left = dict(group.tensors)
        alpha = group.tensors.get("alpha")
        self.alpha = None if alpha is None else float(alpha)
        self.sizes = [_rows(names, path) for path in targets[0].parts or (targets[0].path,)]

    def low_rank(self) -> Iterator[Record | Patch]:
        if not {"down", "up"} <= self.left.keys():
            return
        down, up = self._take("down"), self._take("up")
        up_bias, mid = self._take("up_bias"), self._take("mid")
        self._take("alpha")
        if down.ndim < 2 or up.ndim < 2 or up.shape[1] != len(down):
            raise ValueError(
                f"load_lora: rank must be one for both factors, got {self._key('down')} {list(down.shape)} "
                f"and {self._key('up')} {list(up.shape)}"
            )
        scale = self.alphas.scale(bare(self.group.stem), len(down), self.alpha)
        magnitude = self._magnitude(self.left)
        m, reshaped = self._take(magnitude), self._take("reshape_weight")
        for target, (a, b) in zip(self.targets, self._split(down, up), strict=True):
            layer = self.names.modules[target.path]
            own = {} if m is None else {magnitude: m if m.shape[0] == 1 else self._own(m, target, magnitude)}
            item = self._low_rank_of(layer, a, b, scale, mid, own)
            inputs = self._inputs(target, layer, a, b, reshaped, item)
            bias = None if up_bias is None else scale * wide(self._own(up_bias, target, "up_bias"))
            if bias is None or hasattr(layer, "in_features"):
                yield Record(target.path, item, self._checked_bias(bias, layer, "up_bias"), inputs)
            else:
                yield Record(target.path, item)
                yield Patch(f"{target.path}.bias", self._checked(bias, f"{target.path}.bias", "up_bias"))

    def _low_rank_of(self, layer, down, up, scale, mid, magnitude) -> Factors | Adapter:
        alpha = scale * len(down)
        if hasattr(layer, "in_features") and mid is None:
            down, up = down.flatten(1), up.flatten(1)
            if not magnitude:
                return Factors(down, up, scale)
            return self._made(DoRA, {"lora_A.weight": down, "lora_B.weight": up, **magnitude}, alpha=alpha)
        mid = {} if mid is None else {"lora_mid.weight": mid}
        return self._made(
            LoRA, {"lora_down.weight": down, "lora_up.weight": up, **mid, **magnitude}, alpha=alpha
        )

    def _magnitude(self, found: dict[str, Tensor]) -> str | None:
        """The role of DoRA's magnitude. One per input is a norm over all rows: parts have none."""
        role = next((r for r in ("lora_magnitude_vector", "dora_scale") if r in found), None)
        if role is not None and found[role].shape[0] == 1 and len(self.sizes) > 1:
            raise ValueError(
                f"load_lora: {self._key(role)} must be one number per output, since the model has the layer "
                f"in {len(self.sizes)} parts, got {list(found[role].shape)}"
            )
        return role

    def timed(self) -> Iterator[Record]:
        """Experts per time, of our own names (adapters/timestep.py)."""
        found = {r: self._take(r) for r in list(self.left) if r.startswith("lora_t_")}
        if not found:
            return
        found |= {
            f"lora_{s}.weight": self._take(r) for r, s in (("down", "A"), ("up", "B")) if r in self.left
        }
        self._take("alpha")
        for target in self.targets:
            up = found.get("lora_B.weight")
            own = {} if up is None else {"lora_B.weight": self._own(up, target, "up")}
            item = self._made(TimestepLoRA, found | own)
            item.scale = self.alphas.scale(bare(self.group.stem), item.rank, self.alpha)
            layer, down = self.names.modules[target.path], item.tensor("lora_A.weight")
            self._inputs(target, layer, down, item.tensor("lora_B.weight"), None, item)
            yield Record(target.path, item)

    def lycoris(self) -> Iterator[Record | Patch]:
        for prefix, family in (("hada_", LoHa), ("lokr_", LoKr)):
            found = {r: self._take(r) for r in list(self.left) if r.startswith(prefix)}
            if not found:
                continue
            found |= {r: self._take(r) for r in ("alpha", "dora_scale") if r in self.left}
            hyper = self.alphas.lycoris(bare(self.group.stem), family is LoKr)
            for target in self.targets:
                yield self._lycoris_of(family, found, hyper, target)

    def _lycoris_of(self, family: type, found: dict, hyper: dict, target: Target) -> Record | Patch:
        whole = len(self.sizes) == 1 and not target.swap
        own = dict(found)
        if not whole:
            split = [r for r in ("hada_w1_a", "hada_w2_a", self._magnitude(found)) if r in found]
            own |= {r: self._own(found[r], target, r) for r in split}
        adapter = self._made(family, own, **hyper)
        layer = self.names.modules[target.path]
        if whole or any(r.startswith("hada_") for r in found):
            size, expected = adapter.delta_weight().numel(), _size(layer)
            if size != expected:
                raise ValueError(f"load_lora: {self.group.stem} must have {expected} numbers, got {size}")
            return Record(target.path, adapter)
        if "dora_scale" in found:
            raise ValueError(
                f"load_lora: {self.group.stem}: rows of LoKr with dora_scale have no form of their own"
            )
        # the rows of a Kronecker product are none
        first = next(iter(found))
        delta = self._own(adapter.delta_weight(wide(found[first]).dtype), target, first)
        return Patch(
            f"{target.path}.weight", self._checked(delta, f"{target.path}.weight", next(iter(found)))
        )

    def differences(self) -> Iterator[Record | Patch]:
        for role, parameter in (("diff", "weight"), ("set_weight", "weight"), ("diff_b", "bias")):
            value = self._take(role)
            if value is None:
                continue
            for target in self.targets:
                own = self._own(value, target, role)
                layer = self.names.modules.get(target.path)
                if role == "diff_b" and hasattr(layer, "in_features"):
                    yield Record(target.path, None, self._checked_bias(own, layer, role))
                    continue
                path = target.path if layer is None else f"{target.path}.{parameter}"
                yield Patch(path, self._checked(own, path, role), role == "set_weight")

    # --- parts ---

    def _made(self, family: type[Adapter], tensors: dict[str, Tensor], **hyper) -> Adapter:
        try:
            return family(tensors, **hyper)
        except ValueError as error:
            raise ValueError(f"load_lora: {self.group.stem}: {error}") from None

    def _take(self, role: str | None) -> Tensor | None:
        return self.left.pop(role, None)

    def _key(self, role: str) -> str:
        return self.group.keys[role]

    def _own(self, tensor: Tensor, target: Target, role: str) -> Tensor:
        """The rows of a target."""
        if tensor.shape[0] != sum(self.sizes):
            if len(self.sizes) == 1 and not target.swap:
                return tensor  # checked against the layer
            raise ValueError(
                f"load_lora: {self._key(role)} must have {' + '.join(map(str, self.sizes))} rows, "
                f"got {list(tensor.shape)}"
            )
        part = tensor.split(self.sizes)[target.part]
        return torch.cat(part.chunk(2)[::-1]) if target.swap else part

    def _split(self, down: Tensor, up: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Factors per target: one A for all, or their own where B is block diagonal (sd-scripts)."""
        n = len(self.sizes)
        ups = [self._own(up, target, "up") for target in self.targets]
        if n > 1 and len(down) % n == 0:
            blocks = [part.chunk(n, 1) for part in ups]
            if not any(b.any() for i, row in enumerate(blocks) for j, b in enumerate(row) if i != j):
                yield from zip(down.chunk(n), (row[i] for i, row in enumerate(blocks)), strict=True)
                return
        yield from ((down, own) for own in ups)

    def _inputs(self, target, layer, down, up, reshaped, item) -> int | None:
        """The width that the layer needs, if more than it has; refuses what does not fit."""
        if not hasattr(layer, "in_features"):
            if item.delta_weight().numel() != _size(layer):
                raise ValueError(
                    f"load_lora: {self._key('down')} {list(down.shape)} and {self._key('up')} "
                    f"{list(up.shape)} must fit the weight {list(layer.weight.shape)} of {target.path}"
                )
            return None
        inputs = down.flatten(1).shape[1]
        if len(up) == layer.out_features:
            if inputs in (layer.in_features, getattr(layer, "before_widening", None)):
                return None
            widened = target.path.endswith("x_embedder") if reshaped is None else int(reshaped[1]) == inputs
            if inputs > layer.in_features and widened:
                return inputs
        raise ValueError(
            f"load_lora: {self._key('down')} and {self._key('up')} must be for a weight "
            f"{[layer.out_features, layer.in_features]} of {target.path}, got {[len(up), inputs]}"
        )

    def _checked(self, value: Tensor, path: str, role: str) -> Tensor:
        """A value in the shape of a parameter."""
        holder, _, name = path.rpartition(".")
        parameter = getattr(self.names.modules[holder], name, None)
        shape = (
            [_rows(self.names, holder), self.names.modules[holder].in_features]
            if name == "weight" and (parameter is None or not parameter.is_floating_point())
            else None
            if parameter is None
            else list(parameter.shape)
        )
        if shape is None or value.numel() != torch.Size(shape).numel():
            raise ValueError(
                f"load_lora: {self._key(role)} must have the shape {shape} of {path}, got {list(value.shape)}"
            )
        return value.reshape(shape)

    def _checked_bias(self, value: Tensor | None, layer: nn.Module, role: str) -> Tensor | None:
        if value is not None and value.shape != (layer.out_features,):
            required, got = [layer.out_features], list(value.shape)
            raise ValueError(f"load_lora: {self._key(role)} must be {required}, got {got}")
        return value


def _size(layer: nn.Module) -> int:
    if hasattr(layer, "in_features"):
        return layer.in_features * layer.out_features
    return layer.weight.numel()


def _rows(names: Names, path: str) -> int:
    """Rows of a layer's weight, or of a parameter."""
    layer = names.modules.get(path)
    if layer is None:
        holder, _, name = path.rpartition(".")
        return getattr(names.modules[holder], name).shape[0]
    if hasattr(layer, "out_features"):
        return layer.out_features
    weight = getattr(layer, "weight", None)
    return 0 if weight is None else weight.shape[0]
