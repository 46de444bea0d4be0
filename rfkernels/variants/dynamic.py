r"""Width by time and tokens by content: DyDiT (Zhao et al., "Dynamic Diffusion Transformer", 2024).

    width    m_attn = [1, r_attn(e) > 0],  m_mlp = [1, r_mlp(e) > 0]      of the time embedding e alone
    tokens   x <- x + keep g MLP(..),  keep = W2 ReLU(W1 x + b1) + b2 > 0  after attention, which stays dense

Masks of heads and of groups of the MLP are equal for a whole batch of one time. `WidthPlan` asks the routers
once for a schedule and makes smaller blocks, so a step skips what its masks switch off; the released code
multiplies by them. Routers begin with everything on.

Training: masks are 0 or 1 and have the gradient of a sigmoid (Gumbel noise, temperature 5), and
:math:`(\mathrm{MACs}_{dyn} / \mathrm{MACs}_{static} - \lambda)^2` joins the loss.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rfkernels.ops.norm import gated_residual, norm_modulate
from rfkernels.variants.dit import DiTBlock, compacted
from rfkernels.variants.tokens import Selection, select

__all__ = [
    "DynamicBlock",
    "TokenRouter",
    "WidthPlan",
    "WidthRouter",
    "block_macs",
    "gumbel_switch",
    "macs_loss",
    "width_masks",
]


def gumbel_switch(logits: Tensor, tau: float = 5.0, generator: torch.Generator | None = None) -> Tensor:
    """0 or 1 like logits: 1 where logit + G1 - G2 > 0, G of Gumbel; the gradient is that of
    sigmoid((logit + G1 - G2) / tau)."""
    u = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=torch.float64)
    noisy = logits + torch.logit(u, eps=1e-12).to(logits.dtype)  # G1 - G2 is logistic
    soft = (noisy / tau).sigmoid()
    return (noisy > 0).to(soft.dtype) + (soft - soft.detach())


def _linear(features: int, out: int, bias: float) -> nn.Linear:
    layer = nn.Linear(features, out)
    nn.init.constant_(layer.bias, bias)
    return layer


class WidthRouter(nn.Module):
    """Logits of heads and of groups but the first of each, which is always kept: `[.., H - 1]` twice."""

    def __init__(self, width: int, heads: int, bias: float = 15.0):
        if heads < 2:
            raise ValueError(f"WidthRouter: 2 heads or more required, got {heads}")
        super().__init__()
        self.attn = _linear(width, heads - 1, bias)
        self.mlp = _linear(width, heads - 1, bias)

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        return self.attn(embedding), self.mlp(embedding)


class TokenRouter(nn.Module):
    """The logit of every token, `[batch, tokens]`; its MLP has D / 16 hidden channels."""

    def __init__(self, width: int, bias: float = 35.0):
        super().__init__()
        hidden = max(1, width // 16)
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), _linear(hidden, 1, bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[..., 0]


def _with_first(switches: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(switches[..., :1]), switches], -1)


class DynamicBlock(nn.Module):
    """A DiT block with a router of its width and one of its tokens (absent: all tokens).

    `forward` masks, `skip` leaves the tokens' work out; `WidthPlan` that of heads and groups. All three are
    the same function.
    """

    def __init__(self, block: DiTBlock, tokens: bool = True):
        super().__init__()
        self.block = block
        self.width = WidthRouter(block.width, block.attn.heads)
        self.tokens = TokenRouter(block.width) if tokens else None

    def masks(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """bool `[.., H]` of heads and of groups for time embeddings `[.., width]`."""
        attn, mlp = self.width(embedding)
        return _with_first(attn > 0), _with_first(mlp > 0)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        embedding: Tensor,
        tau: float = 5.0,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The block under its masks, and its MACs for each sample, `[batch]`.

        In training mode switches are `gumbel_switch`. x `[batch, tokens, width]`; c and the time embedding
        `[batch, width]`; c may hold class or text too, the routers see time alone.
        """
        switch = lambda y: gumbel_switch(y, tau, generator) if self.training else (y > 0).to(y.dtype)
        heads, groups = (_with_first(switch(y)) for y in self.width(embedding))
        m = self.block.modulation(c)
        x = self.block.attend(x, m, heads=heads)
        keep = x.new_ones(x.shape[:2]) if self.tokens is None else switch(self.tokens(x))
        y = self.block.mlp(norm_modulate(x, m[4], m[3], eps=self.block.eps[1]), groups)
        x = gated_residual(x, y * keep[..., None], m[5])
        return x, block_macs(self.block, x.shape[1], heads.sum(-1), groups.mean(-1), keep.sum(-1))

    def skip(self, x: Tensor, c: Tensor, block: DiTBlock | None = None, room: int | None = None) -> Tensor:
        """What `forward` makes, where the MLP runs on kept tokens only.

        Args:
            block: of `WidthPlan`; absent: the whole one, without masks of width.
            room: rows of each sample, as of `tokens.select`: fixed, and nothing waits for the device. Where
                more tokens are kept, those of the highest logits.
        """
        block = block or self.block
        m = block.modulation(c)
        x = block.attend(x, m)
        if self.tokens is None:
            return block.feed(x, m)
        logits = self.tokens(x)
        return feed_selected(block, x, m, select(logits > 0, room, logits))


def feed_selected(block: DiTBlock, x: Tensor, m: tuple[Tensor, ...], chosen: Selection) -> Tensor:
    """`block.feed` on some tokens: gather, MLP, scatter."""
    return chosen.put(x, block.feed(chosen.take(x), m))


def block_macs(
    block: DiTBlock, tokens: int, heads: Tensor | float, share: Tensor | float, kept: Tensor | float
) -> Tensor | float:
    """Multiply-accumulates of one sample in a block, routers left out: what the papers call FLOPs.

    Args:
        heads: how many run; share: of hidden channels; kept: how many tokens reach the MLP. Differentiable.
    """
    d, hidden = block.attn.head_dim, block.mlp.fc1.out_features
    attention = heads * d * (4 * block.width * tokens + 2 * tokens**2)
    return attention + 2 * block.width * hidden * share * kept + 6 * block.width**2


def macs_loss(blocks: Sequence[DynamicBlock], macs: Sequence[Tensor], tokens: int, target: float) -> Tensor:
    """(sum of MACs, a mean over samples, / MACs of the whole blocks - target)^2."""
    if not 0 < target <= 1 or len(macs) != len(blocks):
        raise ValueError(
            f"macs_loss: target in (0, 1], MACs of {len(blocks)} blocks required, got {target}, {len(macs)}"
        )
    whole = sum(block_macs(b.block, tokens, b.block.attn.heads, 1.0, tokens) for b in blocks)
    return (torch.stack(list(macs)).sum(0).mean() / whole - target).square()


@torch.no_grad()
def width_masks(blocks: Sequence[DynamicBlock], embeddings: Tensor) -> Tensor:
    """The table bool `[steps, L, 2, H]` (heads, groups) of a schedule's time embeddings `[steps, width]`."""
    return torch.stack([torch.stack(b.masks(embeddings), 1) for b in blocks], 1)


class WidthPlan:
    """The blocks of every step of a schedule, each as wide as its masks.

    Args:
        blocks: L of them; masks: of `width_masks`, read on the host.

    `group[i]` numbers the masks of step i: steps of one number run the same blocks, so one captured graph. A
    layer whose mask comes again, in whichever step, is made once; one that keeps all is the block itself. The
    smaller blocks hold copies of weights: plan anew after training.
    """

    def __init__(self, blocks: Sequence[DynamicBlock], masks: Tensor):
        if masks.dtype != torch.bool or masks.ndim != 4 or masks.shape[1:3] != (len(blocks), 2):
            shape = f"bool[steps, {len(blocks)}, 2, heads]"
            raise ValueError(f"WidthPlan: masks must be {shape}, got {masks.dtype} {list(masks.shape)}")
        table = masks.cpu()
        self.made: dict[tuple[int, bytes], DiTBlock] = {}
        numbers: dict[bytes, int] = {}
        self.group = [numbers.setdefault(step.numpy().tobytes(), len(numbers)) for step in table]
        firsts = [self.group.index(number) for number in range(len(numbers))]
        self._blocks = [
            [self._block(i, b.block, *table[step, i]) for i, b in enumerate(blocks)] for step in firsts
        ]

    def _block(self, layer: int, block: DiTBlock, heads: Tensor, groups: Tensor) -> DiTBlock:
        if heads.all() and groups.all():
            return block
        key = layer, heads.numpy().tobytes() + groups.numpy().tobytes()
        if key not in self.made:
            self.made[key] = compacted(block, heads, groups)
        return self.made[key]

    def blocks(self, step: int) -> list[DiTBlock]:
        """The L blocks of a step."""
        return self._blocks[self.group[step]]
