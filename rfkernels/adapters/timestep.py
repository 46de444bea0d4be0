"""LoRAs that depend on the time: TD-LoRA, TSM (TimeStep Master), T-LoRA.

    dW(t) = s sum_j c_j(t) B_j diag(m(t)) A_j

The papers' forms as coefficients: c one-hot by interval (TSM's core), a gate times a one-hot per coarser
scale (TSM's context), softmax of a small network of the time embedding; m a rank mask that shrinks with
the noise (T-LoRA). One A may serve all j. TD-LoRA's exact formula (DyDiT++) is not public: this family
covers it as its abstract describes it; mixing A and B apart, which gives cross terms, it does not cover.

The coefficients depend on t only, so there are three ways to run a step, with equal results:

    merged     weights made per interval in advance: `merged_at`
    stacked    rank J r, the shrunken columns times a vector on the device: `branch`, `set_time`; in a CUDA
        graph the
               vector changes and nothing else
    switched   one weight, merged anew when the coefficients change: `Switch`
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rfkernels.adapters.base import (
    Additive,
    Branch,
    Factors,
    add_bias,
    check_names,
    check_weight,
    shrink,
    wide,
)
from rfkernels.ops._register import accumulator

__all__ = ["Switch", "TimestepLoRA", "interval_coefficients", "multiscale_coefficients", "rank_mask"]

Time = float | Tensor


def interval_coefficients(t: Time, bounds: Tensor) -> Tensor:
    """One-hot `[J]` (`[batch, J]` for t `[batch]`) of the interval [bounds_j, bounds_j+1) that t lies in.

    Closed on the left; the last interval contains its end too. Raises ValueError for a number outside; a
    tensor is clamped, since looking at it would wait for the device.

    Args:
        bounds: `[J + 1]`, ascending.
    """
    if not isinstance(t, Tensor):
        if not float(bounds[0]) <= t <= float(bounds[-1]):
            raise ValueError(f"t must lie in [{float(bounds[0])}, {float(bounds[-1])}], got {t}")
        t = torch.tensor(t, dtype=bounds.dtype, device=bounds.device)
    index = torch.searchsorted(bounds, t.to(bounds).contiguous(), right=True) - 1
    return nn.functional.one_hot(index.clamp(0, len(bounds) - 2), len(bounds) - 1).to(bounds.dtype)


def multiscale_coefficients(t: Time, scales: Sequence[Tensor], gate: Tensor | None = None) -> Tensor:
    """TSM: the finest scale's expert, plus one expert of each coarser scale times its gate, `[.., sum_i
    J_i]`.

    Args:
        scales: bounds `[J_i + 1]`, the finest first.
        gate: `[.., len(scales) - 1]`, of time; by default ones.
    """
    parts = [interval_coefficients(t, bounds) for bounds in scales]
    if gate is not None:
        if gate.shape[-1] != len(scales) - 1:
            raise ValueError(f"gate must be [.., {len(scales) - 1}], got {list(gate.shape)}")
        parts[1:] = [part * gate[..., i : i + 1] for i, part in enumerate(parts[1:])]
    return torch.cat(parts, -1)


def rank_mask(t: Time, rank: int, least: int, device: torch.device | None = None) -> Tensor:
    """T-LoRA: ones for the first least + floor((rank - least) (1 - t)) columns, `[rank]` or `[batch, rank]`.

    Args:
        t: 0 at the data, 1 at the noise, where only `least` columns remain.
    """
    if not 0 <= least <= rank:
        raise ValueError(f"rank_mask: least must be 0 .. {rank}, got {least}")
    t = torch.as_tensor(t, dtype=torch.float64, device=device)
    active = least + ((rank - least) * (1 - t) + 1e-9).floor()
    return (torch.arange(rank, device=t.device) < active[..., None]).double()


class TimestepLoRA(Additive):
    """A stack of J low-rank experts whose shares depend on t.

    Args:
        tensors: `lora_A.weight` `[J r, in]`, or `[r, in]` for one A that all share; `lora_B.weight` `[out,
            J r]`; and either `lora_t_bounds` `[J + 1]` or `lora_t_router.0.weight` `[h, e]`, `.0.bias`,
            `lora_t_router.2.weight` `[J, h]`, `.2.bias`: softmax(W_2 silu(W_0 temb + b_0) + b_2). Names
            ours: no files are public. Neither: the caller sets coefficients.
        experts: J, where neither bounds nor router give it.
        alpha: s = alpha / r; without it 1.
        least_rank: T-LoRA's smallest rank; by default no mask.
    """

    kind = "a timestep LoRA"
    exact = ("columns",)
    required = ("lora_A.weight", "lora_B.weight")
    _router = tuple(f"lora_t_router.{i}.{n}" for i in (0, 2) for n in ("weight", "bias"))

    def __init__(
        self,
        tensors: dict[str, Tensor],
        experts: int | None = None,
        alpha: float | None = None,
        least_rank: int | None = None,
    ):
        routed = any(name in self._router for name in tensors)
        bounded = "lora_t_bounds" in tensors
        if routed and bounded:
            raise ValueError(f"{self.kind}: bounds or a router, got both")
        extra = self._router if routed else ("lora_t_bounds",) if bounded else ()
        check_names(self.kind, tensors, (*self.required, *extra), ())
        self.required = (*self.required, *extra)
        super().__init__(tensors)
        if bounded:
            experts = len(self.bounds) - 1
            if bool((self.bounds.diff() <= 0).any()):
                raise ValueError(f"{self.kind}: bounds must ascend, got {self.bounds.tolist()}")
        elif routed:
            experts = len(self.tensor("lora_t_router.2.weight"))
        down, up = self.tensor("lora_A.weight"), self.tensor("lora_B.weight")
        if not experts or up.shape[1] % experts or len(down) not in (up.shape[1], up.shape[1] // experts):
            shapes = f"{list(down.shape)}, {list(up.shape)}"
            raise ValueError(
                f"{self.kind}: A [J r, in] or [r, in], B [out, J r], J = {experts} required, got {shapes}"
            )
        self.experts, self.rank = experts, up.shape[1] // experts
        self.shared = experts > 1 and len(down) == self.rank
        self.scale = 1.0 if alpha is None else alpha / self.rank
        self.least_rank = least_rank
        first = torch.zeros(experts * self.rank, dtype=accumulator(up.dtype), device=up.device)
        self.register_buffer("columns", first, persistent=False)

    @property
    def bounds(self) -> Tensor | None:
        return self.tensor("lora_t_bounds")

    def coefficients(self, t: Time, embedding: Tensor | None = None, shares: Tensor | None = None) -> Tensor:
        """c_j(t) m_i(t), `[J r]`, or `[batch, J r]` for t `[batch]`.

        Args:
            embedding: of t, `[.., e]`, for a router.
            shares: c `[.., J]`, of `multiscale_coefficients` or another rule, instead of the adapter's own.
        """
        if shares is None:
            shares = self._shares(t, embedding)
        if shares.shape[-1] != self.experts:
            raise ValueError(f"{self.kind}: shares must be [.., {self.experts}], got {list(shares.shape)}")
        columns = shares.to(self.columns.dtype)[..., None].expand(*shares.shape, self.rank)
        if self.least_rank is not None:
            mask = rank_mask(t, self.rank, self.least_rank, shares.device)
            columns = columns * mask.to(columns.dtype)[..., None, :]
        return columns.flatten(-2)

    def _shares(self, t: Time, embedding: Tensor | None) -> Tensor:
        if self.bounds is not None:
            return interval_coefficients(t, self.bounds)
        w0, b0, w2, b2 = (self.tensor(name) for name in self._router)
        if w0 is None:
            raise ValueError(f"{self.kind} has neither bounds nor router: shares required")
        if embedding is None:
            raise ValueError(f"{self.kind}: its router needs the embedding of t, [.., {w0.shape[1]}]")
        hidden = nn.functional.silu(embedding.to(w0.dtype) @ w0.T + b0)
        return wide(hidden @ w2.T + b2).softmax(-1)

    def set_time(self, t: Time, embedding: Tensor | None = None, shares: Tensor | None = None) -> None:
        """Writes the coefficients of t where `branch` reads them: in place while the shape stays."""
        new = self.coefficients(t, embedding, shares)
        if new.ndim > 1:
            new = new[:, None]  # [batch, 1, J r]
        if new.shape == self.columns.shape:
            self.columns.copy_(new)
        else:
            self.columns = new.to(self.columns.dtype)

    def branch(self, x: Tensor, rows: Tensor | None = None) -> Branch:
        """(hidden `[*lead, J r]` times the coefficients, B, None), for `base.run`.

        Args:
            rows: `[batch]`, a factor per sample: 0 for the unconditional half of guidance.
        """
        columns = self.columns * self.scale
        if rows is not None:
            columns = columns * rows.to(columns.dtype).view(-1, *[1] * (x.ndim - 1))
        down, up = self.tensor("lora_A.weight"), self.tensor("lora_B.weight")
        if not self.shared:
            return shrink(x, down, columns), up, None
        hidden = shrink(x, down)
        return hidden.repeat(*[1] * (x.ndim - 1), self.experts) * columns, up, None

    def delta(self, x: Tensor) -> Tensor:
        """dW(t) x at the time that was set."""
        hidden, up, _ = self.branch(x)
        return hidden @ up.to(hidden.dtype).T

    def factors_at(self, columns: Tensor) -> Factors:
        """The LoRA of coefficients `[J r]`."""
        if columns.ndim != 1:
            raise ValueError(f"{self.kind}: one time for the batch required, got {list(columns.shape)}")
        down, up = self.tensor("lora_A.weight"), self.tensor("lora_B.weight")
        down = wide(down.repeat(self.experts, 1) if self.shared else down)
        return Factors(columns.to(down.dtype)[:, None] * down, up, self.scale)

    def factors(self, weight: Tensor | None = None, bias: Tensor | None = None) -> Factors | None:
        """The LoRA of rank J r of the time that was set, None where the samples have their own."""
        return self.factors_at(self.columns) if self.columns.ndim == 1 else None

    def merged(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """W + dW(t) at the time that was set; refused where the samples have their own."""
        return self._merge(weight, bias, self.columns)

    def merged_at(
        self,
        weight: Tensor,
        bias: Tensor | None,
        t: Time,
        embedding: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """W + dW(t)."""
        return self._merge(weight, bias, self.coefficients(t, embedding, shares))

    def _merge(self, weight: Tensor, bias: Tensor | None, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        shape = (len(self.tensor("lora_B.weight")), self.tensor("lora_A.weight").shape[1])
        weight = check_weight(self.kind, weight, shape)
        form = self.factors_at(columns)
        merged = torch.addmm(weight, form.up.to(weight), form.down.to(weight), alpha=form.scale)
        return merged, add_bias(bias, None, weight.dtype)


class Switch:
    """A plain layer whose weight is that of the current interval.

    Merges from a kept copy, never by subtraction, and only when the coefficients change; worth its 2 out
    in elements of traffic where an interval lasts a few steps.

    Args:
        layer: its weight is overwritten; `restore` gives its bits back.
    """

    def __init__(self, layer: nn.Linear, adapter: TimestepLoRA):
        self.layer, self.adapter = layer, adapter
        self.kept = layer.weight.detach().clone()
        self.columns: Tensor | None = None
        self.merges = 0

    @torch.no_grad()
    def set_time(self, t: float, embedding: Tensor | None = None, shares: Tensor | None = None) -> None:
        """Merges dW(t) if the last merge was of other coefficients; comparing them waits for the device."""
        columns = self.adapter.coefficients(t, embedding, shares)
        if self.columns is not None and torch.equal(columns, self.columns):
            return
        merged, _ = self.adapter._merge(self.kept, None, columns)
        self.layer.weight.copy_(merged)
        self.columns = columns
        self.merges += 1

    @torch.no_grad()
    def restore(self) -> None:
        """The weight as it was."""
        self.layer.weight.copy_(self.kept)
        self.columns = None
