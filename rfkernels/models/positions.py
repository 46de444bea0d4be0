"""Patches of latents as tokens with additive positions: SD3, DiT, SiT and PixArt."""

import torch
from torch import Tensor, nn

__all__ = ["PatchEmbedding", "sincos_grid"]


class PatchEmbedding(nn.Module):
    """A linear layer of every patch, plus its position.

    Args:
        size: rows and columns of latents that the positions were trained with.
        largest: patches per side of the table in the checkpoint (SD3), whose centre is cropped; None: the
            positions are computed, those of another size at the trained extent (DiT, PixArt).
        scale: the positions are divided by it.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        patch: int,
        size: int,
        *,
        largest: int | None = None,
        scale: float = 1.0,
    ):
        super().__init__()
        self.patch, self.largest, self.scale, self.base = patch, largest, scale, size // patch
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        side = largest or self.base
        table = sincos_grid(width, side, side, self.base, scale).float()[None]
        self.register_buffer("pos_embed", table, persistent=largest is not None)

    def forward(self, latents: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, H/p W/p, width]`.

        Raises:
            ValueError: a size that patches do not divide, or larger than the table.
        """
        height, width = latents.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"latents: height and width must be multiples of {self.patch}, got {height} x {width}"
            )
        x = self.proj(latents).flatten(2).transpose(1, 2)
        return (x + self.positions(height // self.patch, width // self.patch)).to(x.dtype).contiguous()

    def positions(self, rows: int, columns: int) -> Tensor:
        """`[1, rows columns, width]`"""
        if self.largest is None:
            if (rows, columns) == (self.base, self.base):
                return self.pos_embed
            device, width = self.pos_embed.device, self.pos_embed.shape[-1]
            return sincos_grid(width, rows, columns, self.base, self.scale, device).float()[None]
        if max(rows, columns) > self.largest:
            raise ValueError(
                f"latents: at most {self.largest} x {self.largest} patches have a position, "
                f"got {rows} x {columns}"
            )
        top, left = (self.largest - rows) // 2, (self.largest - columns) // 2
        table = self.pos_embed.view(self.largest, self.largest, -1)
        return table[top : top + rows, left : left + columns].reshape(1, rows * columns, -1)


def sincos_grid(
    width: int,
    rows: int,
    columns: int,
    base: int,
    scale: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""float64 `[rows columns, width]`: sines and cosines of the column, then those of the row.

    The angles are :math:`p\,10000^{-4i/\mathrm{width}}`, p running from 0 to `base / scale` over either side,
    so that another grid covers the same extent (MAE, He et al., 2022, after Dosovitskiy et al., 2021).
    """
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64, device=device) / (width / 4))

    def side(count: int) -> Tensor:
        p = torch.arange(count, dtype=torch.float32, device=device) / (count / base) / scale
        angle = p.double()[:, None] * frequencies
        return torch.cat([angle.sin(), angle.cos()], -1)

    across = side(columns)[None, :].expand(rows, -1, -1)
    down = side(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([across, down], -1).reshape(rows * columns, -1)
