"""A video from another camera: ReCamMaster (Bai et al., 2025) on Wan.

The frames of the source stand behind those of the target (`concat.beside`, dim 2) with one noise level for
both. Every block adds an embedding of the camera of each frame to the tokens that enter self-attention,

    x[b, f h w] + (W c[b, f mod F] + b),

and has one more linear layer behind it. At initialisation (W, b zero, that layer the identity) the model is
the base model to the bit.
"""

import re

import torch
from torch import Tensor, nn

from rfkernels.ops import norm_modulate
from rfkernels.variants._place import beside_layer

__all__ = ["CameraControl", "fold_projector"]

_KEY = re.compile(r"(?:^|\.)(blocks\.\d+\.(?:cam_encoder|projector)\.(?:weight|bias))$")


def fold_projector(o: nn.Linear, projector: nn.Linear) -> nn.Linear:
    """Returns the one layer that is `projector(o(x))`: W = Wp Wo, b = Wp bo + bp, in float64, rounded once.

    Raises:
        ValueError: other layers than `nn.Linear`, or widths that do not meet.
    """
    if type(o) is not nn.Linear or type(projector) is not nn.Linear:
        got = f"{type(o).__name__} and {type(projector).__name__}"
        raise ValueError(f"fold_projector: two nn.Linear required, got {got}")
    if projector.in_features != o.out_features:
        raise ValueError(
            f"fold_projector: the projector must have the {o.out_features} outputs of o as inputs, got "
            f"{projector.in_features}"
        )
    wide = lambda t: t.detach().double()
    weight = wide(projector.weight) @ wide(o.weight)
    bias = torch.zeros_like(weight[:, 0])
    if o.bias is not None:
        bias += wide(projector.weight) @ wide(o.bias)
    if projector.bias is not None:
        bias += wide(projector.bias)
    has_bias = o.bias is not None or projector.bias is not None
    folded = nn.utils.skip_init(
        nn.Linear, *weight.shape[::-1], bias=has_bias, device=weight.device, dtype=o.weight.dtype
    )
    with torch.no_grad():
        folded.weight.copy_(weight)
        if has_bias:
            folded.bias.copy_(bias)
    return folded.requires_grad_(o.weight.requires_grad).train(o.training)


class CameraControl:
    """Camera encoders and projectors in the blocks of a Wan-like model, until `detach`.

    They are modules of the blocks, `blocks.i.cam_encoder` and `blocks.i.projector`, the released names: they
    move with the model, train with it and are in its `state_dict`. `detach` leaves the model as it was, to
    the bit. A deep copy of the model calls the layers of the original.

    >>> control = CameraControl(model)
    >>> control.load(load_file("recammaster.safetensors"))
    >>> control.cameras = cameras  # [batch, frames, 12], once per clip
    >>> video = sample(beside(velocity, source, dim=2), noise, sigmas)

    Args:
        model: has `blocks`, each with a self-attention `attn1` that takes tokens first and ends in
            `to_out[0]` (diffusers' `WanTransformer3DModel`).
        parameters: numbers of a camera: 12, a 3 x 4 extrinsic matrix relative to the first.
        clips: how often the frames are repeated along the tokens: 2, target and source.
        dtype: of the layers, by default that of `to_out[0]`; required where its weight is codes.

    Raises:
        ValueError: blocks of another kind, or with cameras already; no dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: int = 12,
        *,
        clips: int = 2,
        dtype: torch.dtype | None = None,
    ):
        self.blocks = list(getattr(model, "blocks", ()))
        if not self.blocks or any(not hasattr(getattr(b, "attn1", None), "to_out") for b in self.blocks):
            raise ValueError(
                f"CameraControl: blocks with a self-attention attn1 required, got {type(model).__name__}"
            )
        if any(hasattr(b, "cam_encoder") or hasattr(b, "projector") for b in self.blocks):
            raise ValueError("CameraControl: the blocks must have no cameras yet, got some with cam_encoder")
        self.clips = clips
        self.cameras: Tensor | None = None
        self._unfolded: list[nn.Linear] = []  # last layers of attention, where they are folded
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._projections: list[torch.utils.hooks.RemovableHandle] = []
        for block in self.blocks:
            self._add(block, parameters, dtype)

    def _add(self, block: nn.Module, parameters: int, dtype: torch.dtype | None) -> None:
        out = block.attn1.to_out[0]
        width, place = out.out_features, beside_layer("CameraControl", out, dtype)
        block.cam_encoder = nn.Linear(parameters, width, **place)
        block.projector = nn.Linear(width, width, **place)
        nn.init.zeros_(block.cam_encoder.weight)
        nn.init.eye_(block.projector.weight)
        for layer in (block.cam_encoder, block.projector):
            nn.init.zeros_(layer.bias)
        enter = lambda _, args: (self._with_camera(block.cam_encoder, args[0]), *args[1:])
        self._handles.append(block.attn1.register_forward_pre_hook(enter))
        leave = lambda _, args, out: block.projector(out)
        self._projections.append(block.attn1.register_forward_hook(leave))

    def _with_camera(self, encoder: nn.Linear, x: Tensor) -> Tensor:
        if self.cameras is None:
            return x
        if self.cameras.ndim != 3 or self.cameras.shape[-1] != encoder.in_features:
            raise ValueError(
                f"CameraControl: cameras must be [batch, frames, {encoder.in_features}], got "
                f"{list(self.cameras.shape)}"
            )
        batch, frames = len(self.cameras), self.clips * self.cameras.shape[1]
        if len(x) % batch or x.shape[1] % frames:
            raise ValueError(
                f"CameraControl: {self.clips} clips of cameras {list(self.cameras.shape[:2])} must "
                f"divide the tokens [batch, tokens], got {list(x.shape[:2])}"
            )
        c = encoder(self.cameras.to(encoder.weight)).to(x.dtype).repeat(len(x) // batch, self.clips, 1)
        x = x.unflatten(1, (frames, -1))
        return norm_modulate(x, shift=c[:, :, None], norm="none").flatten(1, 2)

    def load(self, state: dict[str, Tensor]) -> list[str]:
        """Loads the cameras of a file, with any prefix, and returns the names of its other tensors.

        Raises:
            ValueError: a tensor that is missing, or one of a block that there is not; folded projectors.
        """
        if self._unfolded:
            raise ValueError("CameraControl: load before fold required, got projectors that are folded")
        found = {match[1]: state[name] for name in state if (match := _KEY.search(name))}
        mine = {
            f"blocks.{i}.{layer}.{name}": parameter
            for i, block in enumerate(self.blocks)
            for layer in ("cam_encoder", "projector")
            for name, parameter in getattr(block, layer).named_parameters()
        }
        wrong = [f"{name} {'missing' if name in mine else 'unknown'}" for name in mine.keys() ^ found.keys()]
        wrong += [f"{n} {list(t.shape)}" for n, t in found.items() if n in mine and t.shape != mine[n].shape]
        if wrong:
            raise ValueError(
                f"CameraControl: cam_encoder and projector of {len(self.blocks)} blocks required, got "
                + ", ".join(sorted(wrong))
            )
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(found[name])
        return [name for name in state if not _KEY.search(name)]

    def fold(self) -> None:
        """Multiplies every projector into `to_out[0]`: one product less per block, the same function.

        The projectors stay, without effect: save the model before. A second call changes nothing.
        """
        if self._unfolded:
            return
        outs = [block.attn1.to_out[0] for block in self.blocks]
        folded = [fold_projector(o, b.projector) for o, b in zip(outs, self.blocks, strict=True)]
        for block, out in zip(self.blocks, folded, strict=True):
            block.attn1.to_out[0] = out
        self._unfolded = outs
        self._remove(self._projections)

    def detach(self) -> None:
        """Gives the model back as it was."""
        self._remove(self._handles)
        self._remove(self._projections)
        for block, out in zip(self.blocks, self._unfolded, strict=False):  # none where nothing is folded
            block.attn1.to_out[0] = out.to(block.attn1.to_out[0].weight)  # where the model is by now
        for block in self.blocks:
            del block.cam_encoder, block.projector
        self.blocks, self._unfolded = [], []

    def _remove(self, handles: list) -> None:
        for handle in handles:
            handle.remove()
        handles.clear()
