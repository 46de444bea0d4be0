"""Far-reaching interleaved transformers: FIT (Chen and Li, 2023).

Data tokens lie in groups and attend within them; every group has a few latents, which read it, attend to each
other across all groups, and write back. "(4)2(4)2" is four local layers, two global ones, and so twice; the
cost grows with the square of a group and of the number of latents, not of the data.
"""

import re

import torch
from torch import Tensor, nn

from rfkernels.nn import local_attention, run_linear
from rfkernels.ops import attention, norm_modulate

__all__ = ["FIT", "parse_layers"]

EPS = 1e-6


def parse_layers(layers: str) -> list[tuple[int, int]]:
    """The numbers of local and global layers of every stage: "(4)2(2)" is [(4, 2), (2, 0)].

    Raises:
        ValueError: another form.
    """
    if not re.fullmatch(r"(\(\d+\)\d*)+", layers):
        raise ValueError(f'parse_layers: "(local)global(local)global..." required, got {layers!r}')
    return [(int(a), int(b or 0)) for a, b in re.findall(r"\((\d+)\)(\d*)", layers)]


class Attend(nn.Module):
    """x + out(attention(N(x), N(source))), source x itself where `source_width` is None."""

    def __init__(self, width: int, heads: int, source_width: int | None = None):
        super().__init__()
        inner = min(width, source_width or width)
        if heads < 1 or inner % heads:
            raise ValueError(f"FIT: heads must divide the width {inner} of an attention, got {heads}")
        self.heads = heads
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.norm_source = None if source_width is None else nn.LayerNorm(source_width, eps=EPS)
        self.q = nn.Linear(width, inner)
        self.kv = nn.Linear(source_width or width, 2 * inner)
        self.out = nn.Linear(inner, width)

    def forward(
        self, x: Tensor, source: Tensor | None = None, *, groups: int = 1, seen: Tensor | None = None
    ) -> Tensor:
        """x `[batch, tokens, width]`; every one of `groups` runs of x sees its own of the source; or `seen`,
        a mask."""
        n = _norm(self.norm, x)
        s = n if source is None else _norm(self.norm_source, source)
        q = run_linear(self.q, n).unflatten(-1, (self.heads, -1))
        k, v = run_linear(self.kv, s).unflatten(-1, (2, self.heads, -1)).unbind(2)
        if seen is None:
            y = local_attention(q, k, v, groups, layout="blhd")
        else:
            y = attention(q, k, v, bias=seen[None, None], layout="blhd")
        return run_linear(self.out, y.flatten(2), residual=x)


class Layer(nn.Module):
    """Self-attention, then an MLP, norms before both."""

    def __init__(self, width: int, heads: int, mlp: int):
        super().__init__()
        self.attend = Attend(width, heads)
        self.mlp = MLP(width, mlp)

    def forward(self, x: Tensor, **options) -> Tensor:
        return self.mlp(self.attend(x, **options))


class MLP(nn.Module):
    """x + down(gelu(up(N(x))))."""

    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.up = nn.Linear(width, ratio * width)
        self.down = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = run_linear(self.up, _norm(self.norm, x), activation="gelu")
        return run_linear(self.down, hidden, residual=x)


class FIT(nn.Module):
    """The interleaved trunk, between the embedding of data tokens and the head.

    Args:
        layers: as of `parse_layers`. Global layers are preceded by a read and followed by a write, which
            those of the last stage go without; none of the three is there without latents.
        groups: of data tokens.
        latents: of every group; 0 makes a transformer of local layers.
        width, heads: of data tokens.
        latent_width, latent_heads: of latents, by default those of data.
        mlp: hidden units of an MLP, in widths.
        condition: whether latents attend to tokens of a condition (the embedded time, text) before every run
            of global layers.
        self_condition: whether the latents of an earlier evaluation enter, through an MLP and a norm whose
            gain is 0 at initialisation (Jabri et al., 2022).
        causal: global layers see the latents of their own group and of those before.
    """

    def __init__(
        self,
        layers: str,
        groups: int,
        latents: int,
        width: int,
        heads: int,
        *,
        latent_width: int | None = None,
        latent_heads: int | None = None,
        mlp: int = 4,
        condition: bool = False,
        self_condition: bool = False,
        causal: bool = False,
    ):
        super().__init__()
        if groups < 1 or latents < 0:
            raise ValueError(f"FIT: 1 group or more and 0 latents or more required, got {groups}, {latents}")
        wide, wide_heads = latent_width or width, latent_heads or heads
        fewer = min(heads, wide_heads)
        stages = parse_layers(layers)
        self.groups, self.causal, self.stages = groups, causal, nn.ModuleList()
        self.latents = nn.Parameter(0.02 * torch.randn(groups, latents, wide))
        for i, (local, across) in enumerate(stages):
            stage = nn.ModuleDict({"local": nn.ModuleList(Layer(width, heads, mlp) for _ in range(local))})
            if latents and across:
                stage["read"] = Attend(wide, fewer, width)
                if condition:
                    stage["condition"] = Attend(wide, wide_heads, wide)
                stage["across"] = nn.ModuleList(Layer(wide, wide_heads, mlp) for _ in range(across))
                if i + 1 < len(stages):
                    stage["write"] = Attend(width, fewer, wide)
            self.stages.append(stage)
        self.before = nn.ModuleDict()
        if self_condition and latents:
            self.before = nn.ModuleDict({"mlp": MLP(wide, mlp), "norm": nn.LayerNorm(wide, eps=EPS)})
            nn.init.zeros_(self.before["norm"].weight)

    def forward(
        self, x: Tensor, condition: Tensor | None = None, previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns data tokens like x, and latents `[batch, groups latents, latent_width]`.

        Args:
            x: data tokens `[batch, groups rows, width]`, embedded, the groups one behind the other.
            condition: `[batch, tokens, latent_width]`, required where the trunk has one.
            previous: latents of an earlier evaluation, absent: 0; detached, as their step is.
        """
        self._check(x, condition, previous)
        z = self._latents(len(x), previous)
        seen = self._seen(z) if self.causal else None
        for stage in self.stages:
            for layer in stage["local"]:
                x = layer(x, groups=self.groups)
            if "across" not in stage:
                continue
            z = stage["read"](z, x, groups=self.groups)
            if "condition" in stage:
                z = stage["condition"](z, condition)
            for layer in stage["across"]:
                z = layer(z, seen=seen)
            if "write" in stage:
                x = stage["write"](x, z, groups=self.groups)
        return x, z

    def _latents(self, batch: int, previous: Tensor | None) -> Tensor:
        z = self.latents.flatten(0, 1).expand(batch, -1, -1)
        if not self.before:
            return z
        previous = torch.zeros_like(z) if previous is None else previous.detach()
        return z + _norm(self.before["norm"], self.before["mlp"](previous))

    def _seen(self, z: Tensor) -> Tensor:
        group = torch.arange(self.groups, device=z.device).repeat_interleave(self.latents.shape[1])
        return group <= group[:, None]

    def _check(self, x: Tensor, condition: Tensor | None, previous: Tensor | None) -> None:
        wanted = any("condition" in stage for stage in self.stages)
        if wanted != (condition is not None):
            raise ValueError(f"FIT: {'a' if wanted else 'no'} condition required, got {_shape(condition)}")
        z = (len(x), self.latents.shape[:2].numel(), self.latents.shape[2])
        if previous is not None and (not self.before or previous.shape != z):
            wanted = list(z) if self.before else None
            raise ValueError(f"FIT: previous latents {wanted} required, got {_shape(previous)}")


def _shape(t: Tensor | None) -> list[int] | None:
    return None if t is None else list(t.shape)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return norm_modulate(x, weight=norm.weight, bias=norm.bias, eps=norm.eps)
