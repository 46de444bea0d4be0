r"""A linear layer with slots for adapters.

    y = r + g f(k (x W^T) + (x A^T \odot s) B^T + b)

The factors of all slots lie side by side, A `[R, in]` and B `[out, R]`, so that any number of adapters is one
low-rank branch of the base's product. `s` holds strength times alpha / rank of every column, on the device:
adapters are switched, mixed per sample and scheduled over time by writing to it. Loading into a slot copies.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rfkernels.adapters.base import Adapter, Factors, run_linear
from rfkernels.ops._linear import ACTIVATIONS
from rfkernels.ops._register import accumulator
from rfkernels.ops.linear import lora_shrink

__all__ = ["LoRALinear"]


def compute_dtype(base: nn.Module) -> torch.dtype:
    """The dtype of the tokens that a layer works in."""
    for name in ("compute_dtype", "dtype"):
        if isinstance(getattr(base, name, None), torch.dtype):
            return getattr(base, name)
    return base.weight.dtype


class LoRALinear(nn.Module):
    """A layer with the adapters of its slots.

    Args:
        base: an `nn.Linear`, or a layer with `run` as in `run_linear`, `in_features` and `out_features`.
        ranks: of the slots. A narrower adapter leaves the rest zero, so that a swap changes no shape.

    `down` and `up` are parameters, frozen until `requires_grad_()`. Buffers, float32 (float64 for a float64
    layer) also after a conversion of the model to 16 bits:

        strength      [slots] or [batch, 1, slots]
        unit          [R], alpha / rank, and zero where a slot is not filled
        coefficient   [R] or [batch, 1, R], see rfkernels.nn.schedule
        scale         their product, what the branch reads

    Adapters that have no low-rank form stand in `extras`, one slot each (of rank 0).
    """

    def __init__(self, base: nn.Module, ranks: Sequence[int] = ()) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        tensor = next(iter([*base.parameters(), *base.buffers()]))
        self.dtype, self._device = compute_dtype(base), tensor.device
        wide = self._wide()
        self.ranks: tuple[int, ...] = ()
        self.down = nn.Parameter(self._zeros(0, self.in_features, dtype=self.dtype), requires_grad=False)
        self.up = nn.Parameter(self._zeros(self.out_features, 0, dtype=self.dtype), requires_grad=False)
        for name in ("strength", "unit", "coefficient", "scale"):
            self.register_buffer(name, self._zeros(0, dtype=wide))
        self.register_buffer("slot", self._zeros(0, dtype=torch.int64))
        for name in ("bias_table", "column_table", "bias", "column_scale"):
            self.register_buffer(name, None)
        self.extras = nn.ModuleList()
        self.extra_slots: list[int] = []
        for rank in ranks:
            self.add_slot(rank)

    # --- slots ---

    def add_slot(self, rank: int) -> int:
        """One more slot; the only call that changes shapes. Returns its index."""
        index = len(self.ranks)
        self.ranks = (*self.ranks, rank)
        for name, axis in (("down", 0), ("up", 1)):
            old = getattr(self, name)
            shape = list(old.shape)
            shape[axis] = rank
            grown = torch.cat((old.detach(), old.new_zeros(shape)), axis)
            setattr(self, name, nn.Parameter(grown, requires_grad=old.requires_grad))
        for name, more in (("unit", rank), ("coefficient", rank), ("strength", 1)):
            old = getattr(self, name)
            new = old.new_full((*old.shape[:-1], more), name == "coefficient")
            setattr(self, name, torch.cat((old, new), -1))
        self.slot = torch.cat((self.slot, self.slot.new_full((rank,), index)))
        for name in ("bias_table", "column_table"):
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, torch.cat((old, old.new_zeros(1, self.out_features))))
        self.write()
        return index

    @torch.no_grad()
    def widen(self, base: nn.Module) -> None:
        """Another base with more inputs, which no adapter so far reads."""
        more = base.in_features - self.in_features
        self.base, self.in_features = base, base.in_features
        grown = torch.cat((self.down, self.down.new_zeros(len(self.down), more)), 1)
        self.down = nn.Parameter(grown, requires_grad=self.down.requires_grad)

    def columns(self, slot: int) -> slice:
        """The columns of a slot in `up`, its rows in `down`."""
        start = sum(self.ranks[:slot])
        return slice(start, start + self.ranks[slot])

    @torch.no_grad()
    def load(self, slot: int, factors: Factors) -> None:
        """Copies an adapter into a slot; its strength stays what it was.

        Raises:
            ValueError: a rank above the slot's, or factors that do not fit the layer.
        """
        rank = len(factors.down)
        if rank > self.ranks[slot]:
            raise ValueError(
                f"LoRALinear: rank must be at most {self.ranks[slot]}, that of slot {slot}, got {rank}"
            )
        expected = (rank, self.in_features), (self.out_features, rank)
        if (tuple(factors.down.shape), tuple(factors.up.shape)) != expected:
            raise ValueError(
                f"LoRALinear: down and up must be {expected[0]} and {expected[1]}, "
                f"got {tuple(factors.down.shape)} and {tuple(factors.up.shape)}"
            )
        if factors.column_scale is not None and self.strength.ndim > 1:
            raise ValueError("LoRALinear: strengths of DoRA must be one per slot, got one per sample")
        self.clear(slot)
        at = self.columns(slot).start
        up = factors.up
        if factors.column_scale is not None:
            up = factors.column_scale.to(self._wide())[:, None] * up.to(self._wide())
            self._table("column_table")[slot] = factors.column_scale.to(self.unit) - 1
        if factors.bias is not None:
            self._table("bias_table")[slot] = factors.bias.to(self.unit)
        self.down[at : at + rank] = factors.down.to(self.down)
        self.up[:, at : at + rank] = up.to(self.up)
        self.unit[at : at + rank] = factors.scale
        self.write()

    @torch.no_grad()
    def load_extra(self, slot: int, adapter: Adapter) -> None:
        """Puts an adapter that has no low-rank form into a slot, beside a bias that may be there."""
        self.extras.append(adapter.to(self.unit.device))
        self.extra_slots.append(slot)

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Empties a slot: an exact no-op from then on."""
        at = self.columns(slot)
        self.down[at], self.up[:, at], self.unit[at] = 0, 0, 0
        self.coefficient[..., at] = 1
        for table in (self.bias_table, self.column_table):
            if table is not None:
                table[slot] = 0
        kept = [(s, e) for s, e in zip(self.extra_slots, self.extras, strict=True) if s != slot]
        if len(kept) < len(self.extras):
            self.extra_slots, self.extras = [s for s, _ in kept], nn.ModuleList(e for _, e in kept)
        self.write()

    @torch.no_grad()
    def write(self, strength: Tensor | None = None, coefficient: Tensor | None = None) -> None:
        """Writes new strengths `[slots]` or `[batch, slots]`, coefficients `[R]` or `[batch, R]`, or both.

        Nothing is allocated that stays unless a table starts or ends to differ between samples.
        """
        if strength is not None:
            if strength.ndim > 1 and self.column_table is not None:
                raise ValueError("LoRALinear: strengths of DoRA must be one per slot, got one per sample")
            self._put("strength", strength)
        if coefficient is not None:
            self._put("coefficient", coefficient)
        self._put("scale", self.strength[..., self.slot] * self.unit * self.coefficient)
        if self.column_table is not None:
            self._put("column_scale", 1 + self.strength @ self.column_table)
        if self.bias_table is not None and self.strength.ndim == 1:
            self._put("bias", self.strength @ self.bias_table)

    # --- call ---

    def forward(
        self,
        x: Tensor,
        *,
        activation: str = "none",
        gate: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The layer with its adapters, `[*lead, out]`. Arguments as in `ops.linear`."""
        lora, bias = self._branch(x)
        call = {"lora": lora, "bias": bias, "column_scale": self.column_scale}
        if not self.extras:
            return run_linear(self.base, x, **call, activation=activation, gate=gate, residual=residual)
        plain = run_linear(self.base, x)
        y = run_linear(self.base, x, **call).to(self._wide())
        for slot, extra in zip(self.extra_slots, self.extras, strict=True):
            strength = self._rows(self.strength, x)[..., slot, None]
            y = y + strength * (extra(x, _Known(self.base, x, plain)) - plain)
        y = ACTIVATIONS[activation](y)
        y = y if gate is None else y * gate
        return (y if residual is None else y + residual).to(x.dtype)

    def _branch(self, x: Tensor) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        """(hidden, up) and the bias; biases that differ between samples are columns of the branch."""
        lora = None
        if self.down.shape[0]:
            lora = lora_shrink(x, self.down, self._rows(self.scale, x)), self.up
        if self.bias_table is None or self.strength.ndim == 1:
            return lora, self.bias
        hidden = self._rows(self.strength, x).expand(*x.shape[:-1], -1)
        up = self.bias_table.T.to(self.up.dtype)
        if lora is not None:
            hidden, up = torch.cat((lora[0], hidden), -1), torch.cat((self.up, up), 1)
        return (hidden, up), None

    # --- small things ---

    def _rows(self, table: Tensor, x: Tensor) -> Tensor:
        """[batch, 1, n] with as many axes as x."""
        if table.ndim == 1:
            return table
        return table.view(table.shape[0], *[1] * (x.ndim - 2), table.shape[-1])

    def _wide(self) -> torch.dtype:
        return accumulator(self.dtype)

    def _zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def _table(self, name: str) -> Tensor:
        if getattr(self, name) is None:
            setattr(self, name, self.unit.new_zeros(len(self.ranks), self.out_features))
        return getattr(self, name)

    def _put(self, name: str, value: Tensor) -> None:
        """Into the buffer that is there; a new one where the shape differs."""
        if name in ("strength", "coefficient") and value.ndim == 2:
            value = value[:, None]
        old = getattr(self, name)
        if old is not None and old.shape == value.shape:
            old.copy_(value)
        else:
            setattr(self, name, value.to(self.unit, copy=True))

    def _apply(self, fn, recurse=True):
        exact = {n: b for n, b in self._buffers.items() if b is not None and b.is_floating_point()}
        super()._apply(fn, recurse)
        self.dtype = compute_dtype(self.base)
        for name, old in exact.items():
            moved = getattr(self, name)
            if moved.device.type != "meta":
                setattr(self, name, old.to(moved.device, self._wide()))
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, ranks={self.ranks}"


class _Known:
    """The base layer, whose output for `x` is known already."""

    def __init__(self, base: nn.Module, x: Tensor, y: Tensor) -> None:
        self.base, self.x, self.y = base, x, y

    def __call__(self, x: Tensor) -> Tensor:
        return self.y if x is self.x else run_linear(self.base, x)

    def __getattr__(self, name: str):
        return getattr(self.base, name)  # its weight
