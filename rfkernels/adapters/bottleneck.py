"""Bottleneck adapters: AdaptFormer (Chen et al., 2022), Houlsby (2019), Pfeiffer (2020), the conformer
adapter.

    A(x) = s (U act(D x + d) + u),   D [r, in], U [out, r]

    parallel     y = f(x) + A(x)               AdaptFormer: f(x) = x + MLP(LN(x)), A reads x before the norm
    sequential   y = f(x) + A(f(x))            Houlsby, Pfeiffer: on the output of a sub-layer, with the
    residual

The activation keeps every one of them out of the weight. Fused, only the hidden `[M, r]` is written:
`branch` makes it in one product with bias, activation and strength, and the layer's last linear expands it
as its low-rank branch:

    hidden, up, bias = adapter.branch(x)
    y = fc2.run(h, lora=(hidden, up), bias=bias, residual=x)     # or adapters.base.run for an nn.Linear
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rfkernels.adapters.base import Adapter, Branch, Exact, wide
from rfkernels.ops._linear import ACTIVATIONS
from rfkernels.ops._register import accumulator
from rfkernels.ops.linear import linear

__all__ = ["PLACES", "Bottleneck", "BottleneckStack", "ConformerAdapter", "ast_adapters"]

PLACES = {"pfeiffer": ("FFN",), "houlsby": ("MHSA", "FFN")}  # the sub-layers of a block that have one
_ACTIVATIONS = {kind: ACTIVATIONS[kind] for kind in ("relu", "gelu", "gelu_tanh", "silu")}
_DIALECTS = (("down_proj", "up_proj", "relu"), ("linear_downsample", "linear_upsample", "gelu"))


class _Beside(Adapter):
    """An adapter in parallel or in sequence to a layer, that expands a hidden state."""

    position: str

    def branch(self, x: Tensor) -> Branch:
        raise TypeError(f"{type(self).__name__}: a family must define branch")

    def adapt(self, x: Tensor) -> Tensor:
        """A(x), `[*lead, out]`, not rounded."""
        hidden, up, bias = self.branch(x)
        y = hidden @ up.to(hidden.dtype).T
        return y if bias is None else y + bias.to(hidden.dtype)

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """f(x) + A(x), or f(x) + A(f(x))."""
        y = base(x)
        return (wide(y) + self.adapt(x if self.position == "parallel" else y)).to(y.dtype)

    def _check_position(self, position: str) -> None:
        if position not in ("parallel", "sequential"):
            raise ValueError(f'{self.kind}: position must be "parallel" or "sequential", got {position!r}')
        self.position = position

    def merged(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Always refused."""
        raise ValueError(f"{self.kind} cannot be merged into a weight: its activation is not affine in x")


class Bottleneck(_Beside):
    """AdaptFormer's and the audio spectrogram transformer's (AST) adapters.

    Args:
        tensors: `down_proj.weight` `[r, in]`, `down_proj.bias`, `up_proj.weight` `[out, r]`, `up_proj.bias`
            (AdaptFormer), or `linear_downsample`, `linear_upsample` (AST). Biases may be absent.
            AdaptFormer's optional `scale` (one number) and `adapter_layer_norm_before.weight`, `.bias`.
        activation: by default "relu" of AdaptFormer's names, "gelu" of AST's.
        position: "parallel" or "sequential".
        scale: s, where it is not among the tensors: 0.1 in AdaptFormer, 1 by default.
        layer_norm: "none", "in" (of x) or "out" (of s (U h + u)).
    """

    kind = "a bottleneck adapter"

    def __init__(
        self,
        tensors: dict[str, Tensor],
        activation: str | None = None,
        position: str = "parallel",
        scale: float = 1.0,
        layer_norm: str = "none",
    ):
        down, up, usual = next((d for d in _DIALECTS if f"{d[0]}.weight" in tensors), _DIALECTS[0])
        norm = ("adapter_layer_norm_before.weight", "adapter_layer_norm_before.bias")
        self.required = (f"{down}.weight", f"{up}.weight", *(norm if layer_norm != "none" else ()))
        self.optional = (f"{down}.bias", f"{up}.bias", "scale")
        if layer_norm not in ("none", "in", "out"):
            raise ValueError(f'{self.kind}: layer_norm must be "none", "in" or "out", got {layer_norm!r}')
        super().__init__(tensors)
        self._check_position(position)
        self._down, self._up, self.layer_norm = down, up, layer_norm
        self.activation = usual if activation is None else activation
        if self.activation not in _ACTIVATIONS:
            raise ValueError(
                f"{self.kind}: activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}"
            )
        if "scale" in tensors:
            scale = float(tensors["scale"])
        self.strength = scale
        d, u = self.down, self.up
        if d.ndim != 2 or u.ndim != 2 or d.shape[0] != u.shape[1]:
            raise ValueError(
                f"{self.kind}: D [r, in], U [out, r] required, got {list(d.shape)}, {list(u.shape)}"
            )

    @property
    def down(self) -> Tensor:
        return self.tensor(f"{self._down}.weight")

    @property
    def down_bias(self) -> Tensor | None:
        return self.tensor(f"{self._down}.bias")

    @property
    def up(self) -> Tensor:
        return self.tensor(f"{self._up}.weight")

    @property
    def up_bias(self) -> Tensor | None:
        return self.tensor(f"{self._up}.bias")

    def branch(self, x: Tensor) -> Branch:
        """(s act(D x + d) `[*lead, r]`, U, s u): what the layer's last linear expands and adds."""
        if self.layer_norm == "out":
            raise ValueError(f"{self.kind} with a norm of its output has no branch: it needs A(x) whole")
        return self._branch(x)

    def _branch(self, x: Tensor) -> Branch:
        if self.layer_norm == "in":
            x = self._norm(x)
        hidden = _squeeze(x, self.down, self.down_bias, self.activation, self.strength)
        return hidden, self.up, None if self.up_bias is None else self.strength * self.up_bias

    def adapt(self, x: Tensor) -> Tensor:
        """A(x), `[*lead, out]`, not rounded."""
        if self.layer_norm != "out":
            return super().adapt(x)
        hidden, up, bias = self._branch(x)
        y = hidden @ up.to(hidden.dtype).T
        return self._norm(y if bias is None else y + bias.to(hidden.dtype))

    def _norm(self, x: Tensor) -> Tensor:
        weight, bias = (self.tensor(f"adapter_layer_norm_before.{n}") for n in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype))


class ConformerAdapter(_Beside):
    """The convolutional adapter of AST fine-tuning (Cappellazzo et al., 2023), after the conformer's block.

        A(x) = P2 silu(BN(conv_k(glu(P1 LN(x))))),   P1 [2r, in], depthwise conv over tokens, P2 [out, r]

    Args:
        tensors: `lnorm`, `pwise_conv1`, `dwise_conv`, `bnorm`, `pwise_conv2` with `.weight`, `.bias`, and
            `bnorm.running_mean`, `.running_var`; biases of convolutions may be absent.
        position: as in `Bottleneck`.
        compat: the published code computes LN(x) and then goes on with x: True does that, for its files.
        eps: of both norms.

    The batch norm is folded into the convolution, w' = w g / sqrt(v + eps): at inference they are one.
    """

    kind = "a conformer adapter"
    required = (
        *(f"lnorm.{n}" for n in ("weight", "bias")),
        *(f"{conv}.weight" for conv in ("pwise_conv1", "dwise_conv", "pwise_conv2")),
        *(f"bnorm.{n}" for n in ("weight", "bias", "running_mean", "running_var")),
    )
    optional = (
        *(f"{conv}.bias" for conv in ("pwise_conv1", "dwise_conv", "pwise_conv2")),
        "bnorm.num_batches_tracked",
    )

    def __init__(
        self, tensors: dict[str, Tensor], position: str = "parallel", compat: bool = False, eps: float = 1e-5
    ):
        super().__init__(tensors)
        self._check_position(position)
        self.compat, self.eps = compat, eps
        r = len(self.tensor("dwise_conv.weight"))
        first, last = self.tensor("pwise_conv1.weight"), self.tensor("pwise_conv2.weight")
        if len(first) != 2 * r or last.shape[1] != r:
            raise ValueError(
                f"{self.kind} of width r = {r} has pwise_conv1 [2r, in, 1] and pwise_conv2 [out, r, 1], "
                f"got {list(first.shape)} and {list(last.shape)}"
            )

    def folded(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """The depthwise convolution with the batch norm inside: weight `[r, 1, k]`, bias `[r]`."""
        norm = {
            n: self.tensor(f"bnorm.{n}").to(dtype) for n in ("weight", "bias", "running_mean", "running_var")
        }
        gain = norm["weight"] / (norm["running_var"] + self.eps).sqrt()
        bias = self.tensor("dwise_conv.bias")
        shifted = -norm["running_mean"] if bias is None else bias.to(dtype) - norm["running_mean"]
        return self.tensor("dwise_conv.weight").to(dtype) * gain[:, None, None], norm["bias"] + gain * shifted

    def branch(self, x: Tensor) -> Branch:
        """(hidden `[batch, tokens, r]`, P2, its bias), for x `[batch, tokens, in]`."""
        if x.ndim != 3:
            raise ValueError(f"{self.kind}: x must be [batch, tokens, in], got {list(x.shape)}")
        h = x
        if not self.compat:
            weight, bias = (self.tensor(f"lnorm.{n}").to(x.dtype) for n in ("weight", "bias"))
            h = F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        first = self.tensor("pwise_conv1.weight").flatten(1)
        h = F.glu(_squeeze(h, first, self.tensor("pwise_conv1.bias"), "none", 1.0), -1)
        weight, bias = self.folded(h.dtype)
        width = weight.shape[-1] - 1
        h = F.pad(h.transpose(1, 2), (width // 2, width - width // 2))  # "same", as torch pads an even kernel
        h = F.silu(F.conv1d(h, weight, bias, groups=len(weight))).transpose(1, 2)
        return h, self.tensor("pwise_conv2.weight").flatten(1), self.tensor("pwise_conv2.bias")


def ast_adapters(tensors: dict[str, Tensor], design: str = "pfeiffer", **hyper) -> dict[str, Adapter]:
    """The adapters of one block by place, from AST's names `adapter_module_FFN.*` and
    `adapter_module_MHSA.*`.

    Args:
        design: "pfeiffer" (behind the FFN) or "houlsby" (behind attention and FFN).
        hyper: of `Bottleneck`, or of `ConformerAdapter` where the names are its.
    """
    if design not in PLACES:
        raise ValueError(f"ast_adapters: design must be one of {', '.join(PLACES)}, got {design!r}")
    places: dict[str, dict[str, Tensor]] = {f"adapter_module_{p}": {} for p in PLACES[design]}
    for name, tensor in tensors.items():
        place, _, rest = name.partition(".")
        if place not in places:
            raise ValueError(f"ast_adapters: {design} has {', '.join(places)}, got {name}")
        places[place][rest] = tensor
    return {
        place.removeprefix("adapter_module_"): (
            ConformerAdapter if "dwise_conv.weight" in part else Bottleneck
        ).from_state_dict(part, **hyper)
        for place, part in places.items()
    }


class BottleneckStack(Exact):
    """Several bottleneck adapters, of which each sample of a batch has its own or none.

    The hidden states of all lie side by side, those of others times zero. A column for each bias u comes
    from a zero row of D with the bias 1, divided by act(1).

    Args:
        adapters: of one width and activation, without layer norm; their numbers are copied.
    """

    exact = ("scale",)

    def __init__(self, adapters: Sequence[Bottleneck]):
        super().__init__()
        kinds = {(a.activation, a.layer_norm, *a.down.shape[1:], *a.up.shape[:1]) for a in adapters}
        if len(kinds) != 1 or adapters[0].layer_norm != "none":
            raise ValueError(
                f"BottleneckStack: one activation and shape, no layer norm required, got {sorted(kinds)}"
            )
        self.activation = adapters[0].activation
        one = _ACTIVATIONS[self.activation](torch.ones((), dtype=torch.float64)).item()
        downs, biases, ups, owners, scales = [], [], [], [], []
        for i, a in enumerate(adapters):
            d, u = a.down.detach(), a.up.detach()
            downs += [d, d.new_zeros(1, d.shape[1])]
            biases += [d.new_zeros(len(d)) if a.down_bias is None else a.down_bias.detach(), d.new_ones(1)]
            ups += [u, (u.new_zeros(len(u)) if a.up_bias is None else a.up_bias.detach())[:, None] / one]
            owners += [i] * (len(d) + 1)
            scales += [a.strength] * (len(d) + 1)
        device = adapters[0].down.device
        self.register_buffer("down", torch.cat(downs))
        self.register_buffer("bias", torch.cat(biases))
        self.register_buffer("up", torch.cat(ups, 1))
        self.register_buffer("owner", torch.tensor(owners, device=device))
        self.register_buffer("scale", torch.tensor(scales, dtype=torch.float64, device=device))

    def branch(self, x: Tensor, ids: Tensor) -> Branch:
        """(hidden `[*lead, sum_i (r_i + 1)]`, up, None), for `base.run`.

        Args:
            x: `[batch, ..., in]`.
            ids: `[batch]`, which adapter a sample has, -1 for none; on the device of x.
        """
        if ids.shape != x.shape[:1] or ids.is_floating_point():
            raise ValueError(
                f"BottleneckStack: ids must be integers [{len(x)}], got {ids.dtype} {list(ids.shape)}"
            )
        gate = (ids[:, None] == self.owner) * self.scale.to(accumulator(x.dtype))
        gate = gate.view(len(x), *[1] * (x.ndim - 2), -1)
        return _squeeze(x, self.down, self.bias, self.activation, gate), self.up, None


def _squeeze(x: Tensor, down: Tensor, bias: Tensor | None, activation: str, scale: float | Tensor) -> Tensor:
    """scale act(x D^T + d), wide: one call of `ops.linear`."""
    down = down.to(x.dtype)
    bias = None if bias is None else bias.to(accumulator(x.dtype))
    if not isinstance(scale, Tensor):
        scale = (
            None
            if scale == 1
            else torch.full((len(down),), scale, dtype=accumulator(x.dtype), device=x.device)
        )
    return linear(x, down, bias, activation=activation, gate=scale, dtype=accumulator(x.dtype))
