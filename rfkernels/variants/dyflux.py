"""Tokens by content in FLUX: DyFLUX (Zhao et al., "DyDiT++", 2025), on the blocks of diffusers.

    double block   the MLP of the image stream runs on selected tokens
    single block   selected image tokens get attention and MLP, the others nothing; all are keys and values

Text is always processed. A block whose router keeps everything is diffusers' block. Both functions take
`room`: fixed, shapes are too, and nothing waits for the device (`variants.tokens`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfkernels.ops.attention import attention
from rfkernels.variants.tokens import select

__all__ = ["TokenSelect", "double_block", "single_block"]


class TokenSelect(nn.Module):
    """The logit of every image token, `[batch, tokens]`, from itself, the mean of the text and the time.

    w (LN(x) (1 + s) + h + mean_words(LN(text) (1 + s_t) + h_t)) + b, with one affine LN (eps 1e-5) and
    h, s, h_t, s_t = Linear(SiLU(temb)).
    """

    def __init__(self, width: int, bias: float = 35.0):
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.logit = nn.Linear(width, 1)
        nn.init.constant_(self.logit.bias, bias)  # everything is on

    def forward(self, image: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        shift, scale, shift_t, scale_t = (m[:, None] for m in self.modulation(temb).chunk(4, -1))
        pooled = (self.norm(text) * (1 + scale_t) + shift_t).mean(1, keepdim=True)
        return self.logit(self.norm(image) * (1 + scale) + shift + pooled)[..., 0]


def double_block(
    block: nn.Module,
    router: TokenSelect,
    image: Tensor,
    text: Tensor,
    temb: Tensor,
    rope: tuple[Tensor, Tensor] | None = None,
    room: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(text, image) after a `FluxTransformerBlock` whose router reads both streams behind the attention.

    Args:
        image: `[batch, tokens, width]`; text: `[batch, words, width]`; temb: `[batch, width]`.
        rope: cos, sin, as diffusers passes them.
        room: image tokens of each sample in the MLP, as of `tokens.select`.
    """
    x, gate, shift, scale, gate_mlp = block.norm1(image, emb=temb)
    y, *text_m = block.norm1_context(text, emb=temb)
    x, y = block.attn(hidden_states=x, encoder_hidden_states=y, image_rotary_emb=rope)[:2]
    image, text = image + gate[:, None] * x, text + text_m[0][:, None] * y
    logits = router(image, text, temb)
    chosen = select(logits > 0, room, logits)
    rows = _feed(chosen.take(image), block.norm2, block.ff, shift, scale, gate_mlp)
    text = _feed(text, block.norm2_context, block.ff_context, *text_m[1:])
    return _clip(text), chosen.put(image, rows)


def single_block(
    block: nn.Module,
    router: TokenSelect,
    image: Tensor,
    text: Tensor,
    temb: Tensor,
    rope: tuple[Tensor, Tensor] | None = None,
    room: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(text, image) after a `FluxSingleTransformerBlock` whose router reads its input; arguments as above."""
    words, attn = text.shape[1], block.attn
    logits = F.pad(router(image, text, temb), (words, 0), value=torch.inf)
    chosen = select(logits > 0, None if room is None else room + words, logits)
    x = torch.cat([text, image], 1)
    inner, gate = block.norm(x, emb=temb)
    rows = chosen.take(inner)
    q, k, v = (
        project(t).unflatten(-1, (-1, attn.head_dim))
        for project, t in ((attn.to_q, rows), (attn.to_k, inner), (attn.to_v, inner))
    )
    q, k = attn.norm_q(q), attn.norm_k(k)
    if rope is not None:
        cos, sin = (t.expand(len(x), *t.shape) for t in rope)
        q, k = _rotate(q, chosen.take(cos), chosen.take(sin)), _rotate(k, cos, sin)
    y = attention(q, k, v, layout="blhd").flatten(2)
    y = block.proj_out(torch.cat([y, block.act_mlp(block.proj_mlp(rows))], 2))
    x = _clip(chosen.put(x, chosen.take(x) + gate[:, None] * y))
    return x[:, :words], x[:, words:]


def _feed(x: Tensor, norm: nn.Module, ff: nn.Module, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * ff(norm(x) * (1 + scale[:, None]) + shift[:, None])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbouring pairs of x `[batch, tokens, heads, d]`, by tables `[batch, tokens, d]`, in float32."""
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * cos[:, :, None] + turned.to(wide) * sin[:, :, None]).to(x.dtype)


def _clip(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
