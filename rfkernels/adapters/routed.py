"""Low-rank experts: MoLA (Gao et al., 2024), Polytropon and MHR (Ponti et al., Caccia et al., 2023).

    MoLA     y = f(x) + s sum_{e in top-k} g_e B_e A_e x,  g = softmax(x W_g^T) over the chosen; per token
    Poly     y = f(x) + s x A_t B_t,  A_t[q] = sum_s w[q, s] A[q, s], q the split of in, likewise B_t of out;
             w = sigmoid(Z_t) / (sum_s sigmoid(Z_t) + 1e-12), per task; one split: Polytropon, several: MHR

MoLA's gates depend on the token and never merge. All experts run as one stack of rank E r whose columns a
gate
multiplies, zero for those not chosen: no permutation, and for E r <= 256 cheaper than one. Poly's factors
    are mixed
apart, so its sum has cross terms and is not sum_s w_s A_s B_s; it merges exactly per task.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from rfkernels.adapters.base import (
    Adapter,
    Additive,
    Branch,
    Factors,
    apply_factors,
    check_weight,
    shrink,
    wide,
)

__all__ = ["MoLA", "Poly", "route"]


def route(logits: Tensor, k: int) -> Tensor:
    """Gates `[*lead, E]`: softmax over the k largest logits, zero elsewhere; of equal ones the first win.

    The same as softmax over all, then top-k, then division by their sum.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"route: k must be 1 .. {logits.shape[-1]}, got {k}")
    order = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    chosen = logits.gather(-1, order).softmax(-1)
    return torch.zeros_like(logits).scatter(-1, order, chosen)


class MoLA(Additive):
    """Mixture of LoRA experts; layers may have different numbers of them.

    Args:
        tensors: `lora_A.<name>_<e>.weight` `[r, in]`, `lora_B.<name>_<e>.weight` `[out, r]` for e = 0 .. E
            - 1 and one `...router.weight` `[E, in]`; `<name>_` may be absent.
        alpha: s = alpha / r; without it 1.
        k: experts per token.
    """

    kind = "MoLA"
    exact = ("columns",)

    def __init__(self, tensors: dict[str, Tensor], alpha: float | None = None, k: int = 2):
        experts: dict[str, dict[int, str]] = {"A": {}, "B": {}}
        routers = []
        for name in tensors:
            match = re.fullmatch(r"lora_([AB])\.(?:.*_)?(\d+)\.weight", name)
            if match:
                experts[match[1]][int(match[2])] = name
            elif re.fullmatch(r"(.*\.)?router\.weight", name):
                routers.append(name)
            else:
                raise ValueError(
                    f"MoLA has lora_A.<e>.weight, lora_B.<e>.weight and router.weight; unknown: {name}"
                )
        count = len(experts["A"])
        if len(routers) != 1 or not count or any(sorted(e) != list(range(count)) for e in experts.values()):
            raise ValueError(
                f"MoLA: A and B of experts 0 .. E - 1 and one router required, got A {sorted(experts['A'])}, "
                f"B {sorted(experts['B'])}, {len(routers)} routers"
            )
        self.required = tuple(tensors)
        super().__init__(tensors)
        self._downs, self._ups = ([experts[side][e] for e in range(count)] for side in "AB")
        self._router = routers[0]
        self.k = k
        self.ranks = [len(self.tensor(n)) for n in self._downs]
        scales = [1.0 if alpha is None else alpha / r for r in self.ranks]
        owner = [e for e, r in enumerate(self.ranks) for _ in range(r)]
        self.register_buffer("owner", torch.tensor(owner, device=self.router.device), persistent=False)
        self.register_buffer(
            "columns", torch.tensor(scales, dtype=torch.float64)[owner].to(self.router.device), False
        )
        if len(self.router) != count or not 1 <= k <= count:
            raise ValueError(
                f"MoLA: a router [{count}, in] and k of 1 .. {count} required, got "
                f"{list(self.router.shape)}, k {k}"
            )

    @property
    def router(self) -> Tensor:
        return self.tensor(self._router)

    def gates(self, x: Tensor) -> Tensor:
        """g, `[*lead, E]`, in the wide dtype."""
        return route(shrink(x, self.router), self.k)

    def branch(self, x: Tensor) -> Branch:
        """(hidden `[*lead, E r]` gated per token, all B side by side, None), for `base.run`."""
        gates = self.gates(x)
        scale = gates[..., self.owner] * self.columns.to(gates.dtype)
        down = torch.cat([self.tensor(n) for n in self._downs])
        return shrink(x, down, scale), torch.cat([self.tensor(n) for n in self._ups], 1), None

    def delta(self, x: Tensor) -> Tensor:
        """The stack of all experts, gated."""
        hidden, up, _ = self.branch(x)
        return hidden @ up.to(hidden.dtype).T

    def merged(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Always refused."""
        raise ValueError("MoLA cannot be merged into a weight: every token chooses its experts")


class Poly(Adapter):
    """Polytropon and multi-head routing, a task's mixture of skills.

    Args:
        tensors: of PEFT `poly_lora_A` `[Q, S, in / Q, r]`, `poly_lora_B` `[Q, S, r, out / Q]`,
            `poly_router.module_logits` `[tasks, Q S]`, with or without an adapter's name behind the first
            part; of mttl `lora_a` `[S, Q, in / Q, r]`, `lora_b` `[S, r, Q, out / Q]`, `module_logits`.
            Without logits all skills weigh the same (MHR-mu).
        task: which row of the logits; `forward` takes one per sample too.
        alpha: s = alpha / r. PEFT has 1; mttl's files need it.
        merge_after: mttl's option, sum_s w_s (x A_s) B_s, without cross terms; one split only.
    """

    kind = "Poly"

    def __init__(
        self,
        tensors: dict[str, Tensor],
        task: int | None = None,
        alpha: float | None = None,
        merge_after: bool = False,
    ):
        names = {}
        for name in tensors:
            plain = re.sub(r"^(poly_lora_[AB]|poly_router)\.(?!module_logits$)[^.]+", r"\1", name)
            names[plain.removeprefix("poly_router.").removeprefix("selector.")] = name
        mttl = "lora_a" in names
        pair = ("lora_a", "lora_b") if mttl else ("poly_lora_A", "poly_lora_B")
        missing = [n for n in pair if n not in names]
        unknown = [v for k, v in names.items() if k not in (*pair, "module_logits")]
        if missing or unknown:
            raise ValueError(
                f"Poly: {pair[0]}, {pair[1]}, module_logits required; missing: {missing}, unknown: {unknown}"
            )
        if mttl and alpha is None:
            raise ValueError("Poly: mttl's files need alpha, s = alpha / r")
        self.required = tuple(tensors)
        super().__init__(tensors)
        self._pair, self._logits, self.mttl = tuple(names[n] for n in pair), names.get("module_logits"), mttl
        a, b = self.skills()
        splits, skills, part, rank = a.shape
        if b.shape[:3] != (splits, skills, rank):
            shapes = f"{list(a.shape)}, {list(b.shape)}"
            raise ValueError(f"Poly: A [Q, S, in / Q, r], B [Q, S, r, out / Q] required, got {shapes}")
        self.shape, self.rank = (splits * b.shape[3], splits * part), rank
        self.scale = (1.0 if alpha is None else alpha) / rank
        if merge_after and splits != 1:
            raise ValueError(f"Poly: merge_after has one split, got {splits}")
        self.merge_after, self.task = merge_after, task
        logits = self.logits
        if logits is not None and (logits.ndim != 2 or logits.shape[1] != splits * skills):
            raise ValueError(f"Poly: logits must be [tasks, {splits * skills}], got {list(logits.shape)}")

    @property
    def logits(self) -> Tensor | None:
        return None if self._logits is None else self.tensor(self._logits)

    def skills(self) -> tuple[Tensor, Tensor]:
        """A `[Q, S, in / Q, r]` and B `[Q, S, r, out / Q]`, whatever the file's layout."""
        a, b = (self.tensor(n) for n in self._pair)
        return (a.transpose(0, 1), b.permute(2, 0, 1, 3)) if self.mttl else (a, b)

    def weights(self, tasks: Tensor | int | None = None) -> Tensor:
        """w, `[Q, S]` for one task, `[batch, Q, S]` for `[batch]` of them."""
        splits, skills = self.skills()[0].shape[:2]
        tasks = self.task if tasks is None else tasks
        if self.logits is None:
            lead = tasks.shape if isinstance(tasks, Tensor) else ()
            like = self.skills()[0]
            return like.new_full((*lead, splits, skills), 1 / skills)
        if tasks is None:
            raise ValueError(f"Poly: a task of 0 .. {len(self.logits) - 1} required, got none")
        if not isinstance(tasks, Tensor) and not 0 <= tasks < len(self.logits):
            raise ValueError(f"Poly: task must be 0 .. {len(self.logits) - 1}, got {tasks}")
        gates = self.logits[tasks].sigmoid().unflatten(-1, (splits, skills))
        return gates / (gates.sum(-1, keepdim=True) + 1e-12)

    def mixed(self, tasks: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
        """A_t `[.., r, in]` and B_t `[.., out, r]` as LoRA has them."""
        a, b = self.skills()
        w = self.weights(tasks).to(a.dtype)
        down = torch.einsum("...qs,qsdr->...rqd", w, a).flatten(-2)
        up = torch.einsum("...qs,qsrd->...qdr", w, b).flatten(-3, -2)
        return down, up

    def forward(
        self, x: Tensor, base: Callable[[Tensor], Tensor], task: Tensor | int | None = None
    ) -> Tensor:
        """f(x) + s x A_t B_t; `task` a number, or `[batch]` for x `[batch, .., in]`, else `self.task`."""
        y = wide(base(x))
        if self.merge_after or not isinstance(task, Tensor):
            form = self.form(task)
            hidden = shrink(x, form.down)
            return (y + form.scale * (hidden @ form.up.to(hidden.dtype).T)).to(x.dtype)
        if task.shape != x.shape[:1]:
            raise ValueError(f"Poly: one task per sample, [{x.shape[0]}], required, got {list(task.shape)}")
        down, up = (t.to(y.dtype) for t in self.mixed(task))
        tokens = wide(x).flatten(1, -2) if x.ndim > 2 else wide(x)[:, None]
        delta = tokens @ down.transpose(1, 2) @ up.transpose(1, 2)
        return (y + self.scale * delta.view(y.shape)).to(x.dtype)

    def form(self, task: int | None = None) -> Factors:
        """The LoRA of one task: rank r; with merge_after rank S r."""
        if isinstance(task, Tensor):
            raise ValueError("Poly: merge_after and low-rank forms take one task, got a tensor")
        if not self.merge_after:
            down, up = self.mixed(task)
            return Factors(down, up, self.scale)
        a, b = self.skills()
        w = self.weights(task)[0].to(a.dtype)
        down = a[0].transpose(1, 2).flatten(0, 1)
        up = (w[:, None, None] * b[0]).flatten(0, 1).T
        return Factors(down, up, self.scale)

    def factors(self, weight: Tensor | None = None, bias: Tensor | None = None) -> Factors | None:
        """The LoRA of `self.task`; None where no task is set."""
        return None if self.task is None and self.logits is not None else self.form()

    def merged(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """W + s (A_t B_t)^T for `self.task`; refused where no task is set."""
        return apply_factors(check_weight(self.kind, weight, self.shape), bias, self.form())
