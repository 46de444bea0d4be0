"""Z-Image (Tongyi, 2025): base, turbo, edit and omni.

Image and text are refined on their own, then they are one sequence; the image comes first. Captions and
images of any sizes make a batch; learned tokens, which take part, fill each up to a multiple of 32.

Omni: a sample has several images, some of them clean, with captions between them and SigLIP tokens of them.
Text comes first there, and a token is modulated as a clean one or as a noisy one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rfkernels import ops
from rfkernels.models.layers import norm_modulate
from rfkernels.models.parts import Attention, SwiGLU
from rfkernels.models.sandwich import zimage_block
from rfkernels.ops._register import accumulator

__all__ = ["Layout", "Plan", "ZImage", "ZImageBlock"]

MULTIPLE = 32  # of tokens of an image or a caption
CONDITION = 256  # the width of the embedded time, at most
NOTHING = torch.zeros(0, 3, dtype=torch.long, device="cpu")  # positions of an image that there is not

Images = Sequence[Tensor] | Sequence[Sequence[Tensor | None]]


class Piece(NamedTuple):
    """A caption or an image: its tokens, the learned ones behind them, positions `[tokens, 3]` of both."""

    count: int
    pads: int
    ids: Tensor
    noisy: int = 1
    size: tuple[int, ...] = ()  # of an image


class Layout(NamedTuple):
    """What blocks need to know of a batch of sequences that are padded to the longest."""

    rotation: Tensor  # [B, L, d/2, 2]
    key_lengths: Tensor | None  # [B]; None where all are of one length
    index: Tensor | None  # [B, L], the row of the modulation: of sample b clean, then of B + b noisy


class Plan(NamedTuple):
    """Pieces of each sample, by stream, and layouts of the streams and of all in one sequence.

    It depends on sizes alone: the same in every step.
    """

    images: list[list[Piece]]
    captions: list[list[Piece]]
    siglip: list[list[Piece]] | None
    layouts: dict[str, Layout]


def _grid(start: int, size: Sequence[int]) -> Tensor:
    first, *others = (torch.arange(n, device="cpu") for n in size)
    return torch.cartesian_prod(first + start, *others)


def _image(x: Tensor | None, start: int, patch: tuple[int, ...], noisy: int = 1) -> Piece:
    if x is None:
        return _piece(NOTHING, noisy)
    return _piece(_grid(start, [n // p for n, p in zip(x.shape[1:], patch, strict=True)]), noisy, x.shape[1:])


def _piece(ids: Tensor, noisy: int, size: Sequence[int] = ()) -> Piece:
    pads = -len(ids) % MULTIPLE or MULTIPLE * (len(ids) == 0)
    return Piece(len(ids), pads, torch.cat([ids, ids.new_zeros(pads, 3)]), noisy, tuple(size))


def _caption(count: int, start: int, noisy: int = 1) -> Piece:
    """Learned tokens go on in position; as many zeros behind them move the captions that follow, as there."""
    pads = -count % MULTIPLE
    ids = _grid(start, (count + pads, 1, 1))
    return Piece(count, pads, torch.cat([ids, ids.new_zeros(pads, 3)]), noisy)


def _siglip(feats: Tensor | None, start: int, noisy: int, size: tuple[int, ...]) -> Piece:
    """Positions spread over those of an image of the given size."""
    if feats is None:
        return _piece(NOTHING, noisy)
    ids = _grid(start, (1, *feats.shape[:2]))
    if size:
        spread = [ids[:, 0].float()]
        spread += [ids[:, a] / max(feats.shape[a - 1] - 1, 1) * (size[a] - 1) for a in (1, 2)]
        ids = torch.stack(spread, -1).long()
    return _piece(ids, noisy)


def _length(pieces: list[Piece]) -> int:
    return sum(p.count + p.pads for p in pieces)


class ZImageBlock(nn.Module):
    """The weights of `zimage_block`."""

    def __init__(self, width: int, heads: int, eps: float, qk_norm: bool, modulated: bool = True):
        super().__init__()
        norm = "head" if qk_norm else None
        self.attention = Attention(width, heads, width // heads, norm=norm, eps=1e-5, bias=False)
        self.feed_forward = SwiGLU(width, int(width / 3 * 8))
        self.attention_norm1, self.ffn_norm1 = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.attention_norm2, self.ffn_norm2 = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        if modulated:
            self.adaLN_modulation = nn.ModuleList([nn.Linear(min(width, CONDITION), 4 * width)])

    forward = zimage_block


class TimeEmbedding(nn.Module):
    """`linear(silu(linear(sinusoids)))`."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.ModuleList([nn.Linear(256, 1024), nn.Identity(), nn.Linear(1024, width)])

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp[2](ops.silu(self.mlp[0](ops.timestep_embedding(t, 256, dtype=dtype))))


class NormedLinear(nn.ModuleList):
    """A linear layer of normed tokens."""

    def __init__(self, width_in: int, width: int, eps: float):
        super().__init__([nn.RMSNorm(width_in, eps), nn.Linear(width_in, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self[1](ops.norm_modulate(x, norm="rms", weight=self[0].weight, eps=self[0].eps))


class FinalLayer(nn.Module):
    """The norm, scaled by the time, and the layer behind it."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.ModuleList([nn.Identity(), nn.Linear(min(width, CONDITION), width)])

    def forward(self, x: Tensor, temb: Tensor, index: Tensor | None) -> Tensor:
        return self.linear(norm_modulate(x, self.adaLN_modulation[1](ops.silu(temb)), index=index))


class ZImage(nn.Module):
    """Z-Image: arguments and the names of parameters are those of diffusers' ZImageTransformer2DModel.

    Its pipeline negates the result. Positions have no limit: `axes_lens` is not read, nor is `n_kv_heads`, as
    there.
    """

    def __init__(
        self,
        all_patch_size: Sequence[int] = (2,),
        all_f_patch_size: Sequence[int] = (1,),
        in_channels: int = 16,
        dim: int = 3840,
        n_layers: int = 30,
        n_refiner_layers: int = 2,
        n_heads: int = 30,
        n_kv_heads: int = 30,
        norm_eps: float = 1e-5,
        qk_norm: bool = True,
        cap_feat_dim: int = 2560,
        siglip_feat_dim: int | None = None,
        rope_theta: float = 256.0,
        t_scale: float = 1000.0,
        axes_dims: Sequence[int] = (32, 48, 48),
        axes_lens: Sequence[int] = (1024, 512, 512),
    ):
        super().__init__()
        self.axes_dims, self.theta, self.t_scale = tuple(axes_dims), rope_theta, t_scale
        if sum(self.axes_dims) * n_heads != dim:
            raise ValueError(f"ZImage: axes_dims must add up to {dim} / {n_heads}, got {self.axes_dims}")
        self.all_x_embedder, self.all_final_layer = nn.ModuleDict(), nn.ModuleDict()
        for patch, f_patch in zip(all_patch_size, all_f_patch_size, strict=True):
            values = f_patch * patch**2 * in_channels
            self.all_x_embedder[f"{patch}-{f_patch}"] = nn.Linear(values, dim)
            self.all_final_layer[f"{patch}-{f_patch}"] = FinalLayer(dim, values)
        blocks = lambda count, modulated: nn.ModuleList(
            ZImageBlock(dim, n_heads, norm_eps, qk_norm, modulated) for _ in range(count)
        )
        self.noise_refiner = blocks(n_refiner_layers, True)
        self.context_refiner = blocks(n_refiner_layers, False)
        self.t_embedder = TimeEmbedding(min(dim, CONDITION))
        self.cap_embedder = NormedLinear(cap_feat_dim, dim, norm_eps)
        self.siglip_embedder = None
        if siglip_feat_dim is not None:
            self.siglip_embedder = NormedLinear(siglip_feat_dim, dim, norm_eps)
            self.siglip_refiner = blocks(n_refiner_layers, False)
            self.siglip_pad_token = nn.Parameter(torch.zeros(1, dim))
        self.x_pad_token = nn.Parameter(torch.zeros(1, dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, dim))
        self.layers = blocks(n_layers, True)

    def plan(
        self,
        x: Images,
        cap_feats: Images,
        siglip_feats: Sequence | None = None,
        image_noise_mask: Sequence[Sequence[int]] | None = None,
        *,
        patch_size: int = 2,
        f_patch_size: int = 1,
    ) -> Plan:
        """Positions and lengths: `plan=` of every step with inputs of these sizes. Arguments of `forward`."""
        patch = (f_patch_size, patch_size, patch_size)
        omni = image_noise_mask is not None
        images, captions, siglip = [], [], []
        for b in range(len(x)):
            if not omni:
                captions.append([_caption(len(cap_feats[b]), 1)])
                images.append([_image(x[b], _length(captions[-1]) + 1, patch)])
                continue
            noisy, starts, at = image_noise_mask[b], [], 1
            captions.append([])
            for j, text in enumerate(cap_feats[b]):
                captions[-1].append(_caption(len(text), at, noisy[j] if j < len(noisy) else 1))
                starts.append(at + len(text))
                at += len(text) + 2
            starts = starts[: len(noisy)]
            given = zip(x[b], starts, noisy, strict=True)
            images.append([_image(image, start, patch, n) for image, start, n in given])
            if self._reads(siglip_feats):
                given = zip(siglip_feats[b], starts, noisy, images[-1], strict=True)
                siglip.append([_siglip(s, start + 1, n, image.size) for s, start, n, image in given])
        streams = {"images": images, "captions": captions} | ({"siglip": siglip} if siglip else {})
        rows = {name: [_rows(pieces) for pieces in stream] for name, stream in streams.items()}
        rows["joint"] = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in _in_order(rows, omni)]
        device = next(i.device for sample in x for i in (sample if omni else [sample]) if i is not None)
        layouts = {name: self._layout(samples, omni, device) for name, samples in rows.items()}
        return Plan(images, captions, siglip or None, layouts)

    def forward(
        self,
        x: Images,
        t: Tensor,
        cap_feats: Images,
        *,
        siglip_feats: Sequence | None = None,
        image_noise_mask: Sequence[Sequence[int]] | None = None,
        controlnet_block_samples: dict[int, Tensor] | None = None,
        patch_size: int = 2,
        f_patch_size: int = 1,
        plan: Plan | None = None,
    ) -> list[Tensor]:
        """The negative velocities, a list of `[C, F, H, W]`; of the last image of each sample in omni mode.

        Args:
            x: images `[C, F, H, W]`, one per sample; or lists of them, None for one that there is not.
            t: `[B]`, 0 at noise and 1 at data.
            cap_feats: captions `[L, cap_feat_dim]`, one per sample; or lists of them.
            siglip_feats: lists of `[H, W, siglip_feat_dim]` or None, one for each image.
            image_noise_mask: lists of 1 for a noisy image and 0 for a clean one; makes the mode omni.
            controlnet_block_samples: what is added behind layers, by number.

        Raises:
            ValueError: numbers of images, captions and times that differ; lists without image_noise_mask;
                a patch size that the model does not have; sizes that patches do not divide.
        """
        omni = self._check(x, t, cap_feats, image_noise_mask, f"{patch_size}-{f_patch_size}")
        if plan is None:
            sizes = {"patch_size": patch_size, "f_patch_size": f_patch_size}
            plan = self.plan(x, cap_feats, siglip_feats, image_noise_mask, **sizes)
        patch = (f_patch_size, patch_size, patch_size)
        images = [i for sample in x for i in sample if i is not None] if omni else list(x)
        dtype = images[0].dtype
        times = torch.cat([torch.ones_like(t), t]) if omni else t
        temb = self.t_embedder(times * self.t_scale, next(self.t_embedder.parameters()).dtype).to(dtype)

        tokens = torch.cat([ops.patchify(i[None], patch, "pc")[0] for i in images])
        tokens = self.all_x_embedder[f"{patch_size}-{f_patch_size}"](tokens)
        texts = self.cap_embedder(torch.cat([c for s in cap_feats for c in s] if omni else list(cap_feats)))
        sources = {
            "images": (tokens, plan.images, self.x_pad_token, self.noise_refiner, temb),
            "captions": (texts, plan.captions, self.cap_pad_token, self.context_refiner, None),
        }
        if plan.siglip is not None:
            seen = torch.cat([_seen(s) for row in siglip_feats for s in row if s is not None])
            seen = self.siglip_embedder(seen)
            sources["siglip"] = (seen, plan.siglip, self.siglip_pad_token, self.siglip_refiner, None)
        streams = {name: _refined(*source, plan.layouts[name]) for name, source in sources.items()}
        joint = [torch.cat(parts) for parts in _in_order(streams, omni)]
        x, layout = pad_sequence(joint, batch_first=True), plan.layouts["joint"]
        for i, layer in enumerate(self.layers):
            x = layer(x, temb, layout.rotation, layout.index, layout.key_lengths)
            if controlnet_block_samples is not None and i in controlnet_block_samples:
                x = x + controlnet_block_samples[i]
        x = self.all_final_layer[f"{patch_size}-{f_patch_size}"](x, temb, layout.index)
        return [
            _last_image(x[b], _length(plan.captions[b]) if omni else 0, plan.images[b], patch)
            for b in range(len(joint))
        ]

    def _reads(self, siglip_feats: Sequence | None) -> bool:
        return self.siglip_embedder is not None and siglip_feats is not None and siglip_feats[0] is not None

    def _check(self, x, t: Tensor, cap_feats, image_noise_mask, patch: str) -> bool:
        """Whether the mode is omni."""
        if not len(x) == len(cap_feats) == len(t) > 0:
            got = f"{len(x)}, {len(cap_feats)} and {len(t)}"
            raise ValueError(f"ZImage: as many images, captions and times are required, got {got}")
        if patch not in self.all_x_embedder:
            has = ", ".join(self.all_x_embedder)
            raise ValueError(f"ZImage: patch size must be one of {has}, got {patch}")
        omni = image_noise_mask is not None
        if any(isinstance(sample, Tensor) == omni for sample in x):
            what = "lists beside image_noise_mask" if omni else "images, or lists beside image_noise_mask"
            raise ValueError(f"ZImage: x must be {what}, got {type(x[0]).__name__}")
        for sample, texts, noisy in zip(x, cap_feats, image_noise_mask or (), strict=omni):
            images = sum(i is not None for i in sample)
            if not (images and len(sample) == len(noisy) <= len(texts)):
                got = f"{len(noisy)} for {len(sample)} images ({images} given) and {len(texts)} captions"
                need = "a number for each image and no more than captions"
                raise ValueError(f"ZImage: image_noise_mask must have {need}, got {got}")
        return omni

    def _layout(self, samples: list[tuple[Tensor, Tensor]], omni: bool, device: torch.device) -> Layout:
        """Of samples (positions, noisy)."""
        ids, noisy = zip(*samples, strict=True)
        lengths, dtype = [len(i) for i in ids], accumulator(next(self.parameters()).dtype)
        positions = pad_sequence(ids, batch_first=True).to(device)
        rotation = ops.rotary_table(positions, self.axes_dims, self.theta, dtype=dtype)
        ragged = len(set(lengths)) > 1
        key_lengths = torch.tensor(lengths, dtype=torch.int32, device=device) if ragged else None
        index = None
        if omni:
            rows = torch.arange(len(ids), device="cpu")[:, None]
            index = (pad_sequence(noisy, batch_first=True) * len(ids) + rows).to(device)
        return Layout(rotation, key_lengths, index)


def _in_order(streams: dict[str, list], omni: bool) -> zip:
    """Of each sample what the streams have, as they follow one another."""
    order = ("captions", "images", "siglip") if omni else ("images", "captions")
    return zip(*(streams[name] for name in order if name in streams), strict=True)


def _seen(feats: Tensor) -> Tensor:
    """SigLIP tokens as diffusers reads them: numbers in the order of channels first, cut into tokens."""
    return feats.permute(2, 0, 1).reshape(-1, feats.shape[2])


def _rows(pieces: list[Piece]) -> tuple[Tensor, Tensor]:
    """Positions of all tokens, and whether they are noisy."""
    noisy = [torch.full((p.count + p.pads,), p.noisy, device="cpu") for p in pieces]
    return torch.cat([p.ids for p in pieces])[: _length(pieces)], torch.cat(noisy)


def _refined(
    tokens: Tensor,
    samples: list[list[Piece]],
    pad: Tensor,
    blocks: nn.ModuleList,
    temb: Tensor | None,
    layout: Layout,
) -> list[Tensor]:
    """The sequence of each sample, from the tokens of all pieces and the learned ones behind each."""
    parts, pad = iter(tokens.split([p.count for pieces in samples for p in pieces])), pad.to(tokens.dtype)
    x = pad_sequence(
        [torch.cat([t for p in pieces for t in (next(parts), pad.expand(p.pads, -1))]) for pieces in samples],
        batch_first=True,
    )
    for block in blocks:
        x = block(x, temb, layout.rotation, None if temb is None else layout.index, layout.key_lengths)
    return [row[: _length(pieces)] for row, pieces in zip(x, samples, strict=True)]


def _last_image(x: Tensor, start: int, pieces: list[Piece], patch: tuple[int, int, int]) -> Tensor:
    """`[C, F, H, W]` of the last image that there is, in a sequence whose images begin at `start`."""
    last = max(i for i, piece in enumerate(pieces) if piece.size)
    start += _length(pieces[:last])
    return ops.unpatchify(x[None, start : start + pieces[last].count], pieces[last].size, patch, "pc")[0]
