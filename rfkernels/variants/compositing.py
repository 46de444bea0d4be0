"""A video put into another: GenCompositor (Yang et al., 2025) on CogVideoX.

One sequence [text; background; foreground], the background and the foreground T x H x W tokens each, which
differ in their rotary positions; a branch preserves the background outside of a mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfkernels.nn import run_linear
from rfkernels.ops import rotary_table

__all__ = ["BackgroundFusion", "erope_ids", "erope_table", "fuse_background", "mask_tokens"]


def erope_ids(
    frames: int,
    height: int,
    width: int,
    *,
    released: bool = True,
    device: torch.device | str | None = None,
) -> Tensor:
    """Returns the positions (t, h, w) of the tokens [background; foreground], int64 `[2 T H W, 3]`.

    The paper extends the height: the background has h < H, the foreground H <= h < 2 H (`released=False`).
    The released code numbers a grid T x 2H x W and hands its positions one by one to the sequence, so that
    frame t of the 2 T frames stands at time t // 2, in the lower half where t is odd; its weights need that.
    """
    if min(frames, height, width) < 1:
        raise ValueError(f"erope_ids: a grid of 1 or more required, got {(frames, height, width)}")
    axes = [torch.arange(n, device=device) for n in (frames, 2 * height, width)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    if not released:
        grid = torch.stack([grid[:, :height], grid[:, height:]])
    return grid.reshape(-1, 3)


def erope_table(
    frames: int,
    height: int,
    width: int,
    *,
    axes_dims: tuple[int, int, int] = (16, 24, 24),
    theta: float = 10000.0,
    released: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The `rotation` of `ops.qkv_norm_rope` for `erope_ids`, with `rotate_from` the number of text tokens.

    `axes_dims` are those of CogVideoX, whose heads have 64 channels.
    """
    ids = erope_ids(frames, height, width, released=released, device=device)
    return rotary_table(ids, axes_dims, theta, dtype=dtype)


def mask_tokens(mask: Tensor, patch: int = 2) -> Tensor:
    """Returns which tokens have any of a mask: its mean over patch x patch is above 0; bool `[batch, T H W]`.

    Args:
        mask: `[batch, frames, height, width]` of the latent's size, bool or from 0 up.

    Raises:
        ValueError: a size that patches do not divide.
    """
    if mask.ndim != 4 or patch < 1 or any(n % patch for n in mask.shape[2:]):
        raise ValueError(
            f"mask_tokens: mask must be [batch, frames, height, width] that patches of {patch} divide, got "
            f"{list(mask.shape)}"
        )
    return F.max_pool2d((mask > 0).float(), patch).flatten(1) > 0


def fuse_background(h: Tensor, branch: Tensor, mask: Tensor) -> Tensor:
    """Returns `where(mask, h, h + branch)`: the branch speaks for the background outside of the mask.

    Args:
        h, branch: `[batch, tokens, width]`.
        mask: bool `[batch or 1, tokens]`, of `mask_tokens`.
    """
    _check("fuse_background", h, branch, mask)
    return torch.where(mask[..., None], h, h + branch)


class BackgroundFusion(nn.Module):
    """One linear layer per main block, `branch_blocks.i`, zero at initialisation: the branch's way in."""

    def __init__(self, blocks: int, width: int, branch_width: int | None = None):
        super().__init__()
        self.branch_blocks = nn.ModuleList(nn.Linear(branch_width or width, width) for _ in range(blocks))
        for layer in self.branch_blocks:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, block: int, h: Tensor, branch: Tensor, mask: Tensor) -> Tensor:
        """Returns h behind a main block, the background first, with the branch in what the mask leaves.

        Args:
            block: the number of the block.
            h: `[batch, tokens, width]`: the first tokens are the background, as many as the branch has.
            branch: `[batch, background, branch_width]`, behind the branch's block.
            mask: bool `[batch or 1, background]`.
        """
        tokens = branch.shape[1]
        background = h[:, :tokens]
        _check("BackgroundFusion", background, branch, mask, widths=False)
        spoken = run_linear(self.branch_blocks[block], branch, residual=background)
        return torch.cat([torch.where(mask[..., None], background, spoken), h[:, tokens:]], 1)


def _check(op: str, h: Tensor, branch: Tensor, mask: Tensor, widths: bool = True) -> None:
    axes = slice(None) if widths else slice(2)
    fits = h.ndim == branch.ndim == 3 and h.shape[axes] == branch.shape[axes]
    if not fits or mask.dtype != torch.bool or mask.shape not in ((1, h.shape[1]), h.shape[:2]):
        raise ValueError(
            f"{op}: h, branch [batch, tokens, width] and a bool mask [batch or 1, tokens] required, got "
            f"{list(h.shape)}, {list(branch.shape)}, {mask.dtype} {list(mask.shape)}"
        )
