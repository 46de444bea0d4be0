"""The embedded text-to-emoji model: a small FLUX in pixel space that predicts pictures."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from rfkernels.models import text as text_module
from rfkernels.models.blocks import (
    DoubleBlock,
    SingleBlock,
    as_halves,
    as_neighbours,
    kit_of,
    rope_table,
    sinusoid,
)
from rfkernels.models.text import TextEncoder, TextTokens

__all__ = ["EmojiConfig", "EmojiFlow", "load_emoji", "to_images"]

SIGMA_MIN = 0.05  # velocities divide by max(sigma, SIGMA_MIN)
DEFAULT_WEIGHTS = Path(__file__).parent.parent / "weights" / "emoji.safetensors"


@dataclass(frozen=True)
class EmojiConfig:
    """The shape of the model, and how it is best sampled; stored in the weights file.

    steps, guidance (1: none), method: of the sampler; shift: of its schedule, 1 is linear.
    """

    size: int = 64
    patch: int = 8
    channels: int = 4
    width: int = 256
    heads: int = 4
    mlp: int = 4
    double_blocks: int = 2
    single_blocks: int = 4
    table: int = 8192
    embed: int = 128
    styles: tuple[str, ...] = ("noto", "blob", "flat", "3d")
    steps: int = 8
    guidance: float = 3.0
    shift: float = 1.0
    method: str = "ab2"


class EmojiFlow(nn.Module):
    """Velocity of a rectified flow over RGBA emoji, conditioned on a text.

    A sample is [batch, 4, size, size] in [-1, 1]: red, green, blue premultiplied by alpha, and alpha, each
    mapped by 2 c - 1. The network predicts the picture x0 (Li & He, "Back to Basics", 2025) and the velocity
    follows as v = (x - x0) / max(sigma, 0.05), in the convention x_sigma = (1 - sigma) x0 + sigma eps, v =
    eps - x0.
    """

    def __init__(self, config: EmojiConfig = EmojiConfig()):
        super().__init__()
        self.config = c = config
        self.grid = c.size // c.patch
        patch = c.channels * c.patch**2
        self.text = TextEncoder(c.table, c.embed, c.width)
        self.image_in = nn.Linear(patch, c.width)
        self.time = nn.Sequential(nn.Linear(c.width, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.pooled = nn.Linear(c.width, c.width)
        self.modulation = nn.Linear(c.width, 6 * c.width)
        self.double_blocks = nn.ModuleList(
            DoubleBlock(c.width, c.heads, c.mlp) for _ in range(c.double_blocks)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(c.width, c.heads, c.mlp) for _ in range(c.single_blocks)
        )
        self.out_offset = nn.Parameter(torch.zeros(2, c.width))
        self.out = nn.Linear(c.width, patch)
        self.register_buffer("rotation", rope_table(self.grid, self.head_dim), persistent=False)
        self.register_buffer("known_words", torch.zeros(0, dtype=torch.int32))
        self._init()

    def _init(self) -> None:
        if self.out.weight.is_meta:  # a loader brings the values; meta tensors would import torch's compiler
            return
        nn.init.normal_(self.text.table, std=0.5)
        for name, p in self.named_parameters():
            if p.ndim == 2 and name.endswith("weight"):
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for p in (self.out.weight, self.modulation.weight):
            nn.init.zeros_(p)
        for block in self.double_blocks:
            for stream in (block.image, block.text):
                stream.offset.data[[2, 5]] = 0.5
        for block in self.single_blocks:
            block.offset.data[2] = 0.5

    @property
    def head_dim(self) -> int:
        return self.config.width // self.config.heads

    def state_dict(self, *args, prefix: str = "", **options) -> dict[str, Tensor]:
        """Rotary pairs are halves of a head there and in files, and neighbours in the parameters."""
        state = super().state_dict(*args, prefix=prefix, **options)
        own = {name: t for name, t in state.items() if name.startswith(prefix)}
        state.update(as_halves(own, self.config.width, self.head_dim))
        return state

    def _load_from_state_dict(self, state_dict, *args):
        state_dict.update(as_neighbours(state_dict, self.config.width, self.head_dim))
        super()._load_from_state_dict(state_dict, *args)

    @property
    def dtype(self) -> torch.dtype:
        return self.out_offset.dtype  # layers may be quantised or hold adapters

    def encode(self, prompts: list[str]) -> TextTokens:
        """Tokenizes prompts; "" is the unconditional prompt. Words beyond 16 are cut, see `truncated`."""
        rows, weights, mask = text_module.tokenize(prompts, self.config.table)
        split = [text_module.words(p) for p in prompts]
        known = set(self.known_words.tolist())
        used = [s[: text_module.MAX_WORDS] for s in split]
        device = self.out_offset.device
        return TextTokens(
            torch.from_numpy(rows).to(device),
            torch.from_numpy(weights).to(device),
            torch.from_numpy(mask).to(device),
            unknown=[[w for w in s if text_module.word_key(w) not in known] for s in used],
            truncated=[s[text_module.MAX_WORDS :] for s in split],
        )

    def forward(self, x: Tensor, sigma: Tensor, text: TextTokens) -> Tensor:
        """Velocity like x for x [batch, 4, size, size], sigma [batch] and a text of batch prompts."""
        return self.velocity(x, sigma, text.rows, text.weights, text.mask)

    def velocity(self, x: Tensor, sigma: Tensor, rows: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        """`forward` of tensors alone: what a `GraphRunner` takes."""
        x0 = self.predict(x.to(self.dtype), sigma, rows, weights, mask)
        scale = sigma.float().clamp(min=SIGMA_MIN)[:, None, None, None]
        return ((x.float() - x0.float()) / scale).to(x.dtype)

    def guided(self, x: Tensor, sigma: Tensor, text: TextTokens) -> tuple[Tensor, Tensor]:
        """The velocities without and with the prompts, in one evaluation; text of [""] * batch + prompts."""
        uncond, cond = self(torch.cat([x, x]), torch.cat([sigma, sigma]), text).chunk(2)
        return uncond, cond

    def predict(self, x: Tensor, sigma: Tensor, rows: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        """The picture x0 that the network expects behind x at noise level sigma, like x."""
        words, pooled = self.text(rows, weights, mask)
        time = self.time(sinusoid(sigma, self.config.width, words.dtype))
        shared = self.modulation(F.silu(time + self.pooled(pooled))).unflatten(-1, (6, -1))
        tokens = self.grid**2
        lengths = mask.sum(1, dtype=torch.int32) + tokens
        rotation = self.rotation.to(torch.float64 if words.dtype == torch.float64 else torch.float32)

        image = self.image_in(self.patchify(x))
        for block in self.double_blocks:
            image, words = block(image, words, shared, rotation, lengths)
        both = torch.cat([image, words], 1)
        for block in self.single_blocks:
            both = block(both, shared[:, :3], rotation, lengths)
        shift, scale = (shared[:, 3:5] + self.out_offset).to(both.dtype).unbind(1)
        return self.unpatchify(self.out(kit_of(both).norm_modulate(both[:, :tokens], scale, shift)))

    def patchify(self, x: Tensor) -> Tensor:
        """[batch, channels, size, size] -> [batch, grid^2, channels patch^2]."""
        p, g = self.config.patch, self.grid
        return x.unflatten(2, (g, p)).unflatten(4, (g, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """The inverse of patchify."""
        p, g, c = self.config.patch, self.grid, self.config.channels
        return (
            tokens.unflatten(1, (g, g))
            .unflatten(3, (c, p, p))
            .permute(0, 3, 1, 4, 2, 5)
            .flatten(4)
            .flatten(2, 3)
        )


def load_emoji(
    path: str | Path | None = None, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> EmojiFlow:
    """The trained model, in evaluation mode.

    Args:
        path: a weights file; default the one that ships with the package.
        device, dtype: where its parameters go and their type (float32, bfloat16 or float16).

    Raises:
        WeightsError: the file is missing, truncated or not a weights file of this model.
    """
    from rfkernels.models.checkpoint import read_emoji

    return read_emoji(
        Path(path) if path is not None else DEFAULT_WEIGHTS, device=torch.device(device), dtype=dtype
    )


def to_images(x: Tensor) -> list[Image.Image]:
    """RGBA pictures (straight alpha, 8 bit) of samples [batch, 4, height, width] as the model makes them."""
    y = ((x.detach().float().cpu().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
    alpha = y[..., 3:]
    alpha = np.where(alpha < 0.03, 0, np.where(alpha > 0.97, 1, alpha))
    colour = np.divide(y[..., :3], alpha, out=np.zeros_like(y[..., :3]), where=alpha > 0)
    pixels = np.concatenate([colour.clip(0, 1), alpha], -1)
    return [Image.fromarray(p) for p in (pixels * 255).round().astype(np.uint8)]
