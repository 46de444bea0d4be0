r"""Sharing of values between an inversion and an edit: RF-Edit.

Wang et al., "Taming rectified flow for inversion and editing", 2024: the values V of self-attention in some
blocks, noted in the last steps of an inversion, take the place of those of the first steps of an edit, and
keep the layout of the picture.

V is a linear map of the tokens, so a hook on that layer notes and replaces it, whatever computes the
attention: any processor of diffusers (FLUX, SD3, Wan, ...), ours, and the blocks of the embedded model.
"""

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from rfkernels.editing._launches import Velocity

__all__ = ["ValueSharing", "feature_bytes", "value_layers"]

# Layers of a module that make V: all of their result, or its last third.
_VALUES = ("to_v", "add_v_proj", "to_v_t")
_FUSED = ("to_qkv", "to_added_qkv")
Layer = tuple[nn.Module, Callable[[int], slice]]


def value_layers(model: nn.Module) -> dict[str, list[Layer]]:
    """The self-attentions of a model and the layers that make their V, in order: {name: [(layer, part),
    ...]}.

    Known are attention modules of diffusers (`to_v`, `add_v_proj`, or fused `to_qkv`, `to_added_qkv`;
    HiDream's `to_v_t`), attention to other tokens left out, and the blocks of `rfkernels.models.blocks`.
    `part(width)` is where V lies in the layer's result.
    """
    from rfkernels.models.blocks import DoubleBlock, SingleBlock

    found: dict[str, list[Layer]] = {}
    for name, module in model.named_modules():
        if isinstance(module, DoubleBlock):
            found[name] = [(module.image.qkv, _last_third), (module.text.qkv, _last_third)]
        elif isinstance(module, SingleBlock):
            width = module.width
            found[name] = [(module.qkv_up, lambda _, w=width: slice(2 * w, 3 * w))]
        elif hasattr(module, "set_processor") and not _attends_elsewhere(name, module):
            layers = _layers_of(module)
            if layers:
                found[name] = layers
    return found


def _layers_of(module: nn.Module) -> list[Layer]:
    fused = [getattr(module, n, None) for n in _FUSED]
    fused = [layer for layer in fused if isinstance(layer, nn.Module)]
    if fused and getattr(module, "fused_projections", True):
        return [(layer, _last_third) for layer in fused]
    own = [getattr(module, n, None) for n in _VALUES]
    return [(layer, _whole) for layer in own if isinstance(layer, nn.Module)]


def _attends_elsewhere(name: str, module: nn.Module) -> bool:
    """Cross-attention: diffusers marks it, or by custom its block calls it attn2."""
    marked = getattr(module, "is_cross_attention", None)
    return name.rsplit(".", 1)[-1] == "attn2" if marked is None else marked


def _whole(width: int) -> slice:
    return slice(0, width)


def _last_third(width: int) -> slice:
    return slice(width - width // 3, width)


class ValueSharing:
    r"""Notes V in one run and puts it into another, through hooks that end with the context.

    >>> with ValueSharing(model, blocks, inject=5) as sharing:
    ...     noise = invert(sharing.storing(v, steps, 2), x, grid)                       # rf-solver: two a
    step ...     edited = sample(sharing.injecting(w, steps, 2), noise, grid, method="rf-solver")

    Values are kept by block, evaluation within a step, and the step's noisier end, as released: of the two
    evaluations of a midpoint step, the one in the middle meets its own noise level again, the one at the
    start meets that of the other end of its interval. `matched_time` takes the value of the same level
    instead; at the noisiest level there is none, and that evaluation is left alone. Outside of the wrapped
    velocities the hooks do nothing.

    Args:
        model: see `value_layers`.
        blocks: names of its self-attentions, or `blocks(index, name)`; None for all. FLUX: single blocks 20
            and on.
        inject: steps of an edit, from the noisiest, whose V is replaced. As many as there are freeze the
            edit.
        device: where values are kept, "cpu" to spare memory; None where they are.
        matched_time: see above.
        picture: which tokens are the picture's where one stream holds both (FLUX: text first; the embedded
            model: picture first); then text keeps its own V, and prompts may differ in length. None for all
            tokens, as released.

    Raises:
        ValueError: no self-attention, or blocks that there are not.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[str] | Callable[[int, str], bool] | None = None,
        *,
        inject: int = 5,
        device: torch.device | str | None = None,
        matched_time: bool = False,
        picture: slice | None = None,
    ):
        self.layers = _chosen(value_layers(model), blocks, type(model).__name__)
        if picture is not None:  # the first of two streams is the picture's
            self.layers = {name: layers[:1] for name, layers in self.layers.items()}
        self.streams = {name: len(found) for name, found in value_layers(model).items()}
        self.picture = picture
        self.inject, self.device, self.matched_time = inject, device, matched_time
        self.values: dict[tuple[str, int, int, int], Tensor] = {}
        self._store: tuple[int, int] | None = None  # (step, evaluation) under way
        self._load: tuple[int, int] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "ValueSharing":
        for name, layers in self.layers.items():
            for i, (layer, part) in enumerate(layers):
                hook = lambda _m, _in, out, key=(name, i), part=part: self._hook(key, part, out)
                self._handles.append(layer.register_forward_hook(hook))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def clear(self) -> None:
        """Forgets all values."""
        self.values.clear()

    @property
    def nbytes(self) -> int:
        """Memory of the values kept."""
        return sum(v.numel() * v.element_size() for v in self.values.values())

    def storing(self, velocity: Velocity, steps: int, evaluations: int = 1) -> Velocity:
        """The velocity for an inversion, grid rising, of `steps` steps with `evaluations` each: notes V.

        The wrapped velocity counts its calls: use each for one run.
        """
        return self._counting(velocity, steps, evaluations, "_store")

    def injecting(self, velocity: Velocity, steps: int, evaluations: int = 1) -> Velocity:
        """The velocity for an edit, grid falling, of as many steps: V of the first `inject` is replaced."""
        return self._counting(velocity, steps, evaluations, "_load")

    def _counting(self, velocity: Velocity, steps: int, evaluations: int, role: str) -> Velocity:
        calls = 0

        def counted(x: Tensor, sigma: Tensor):
            nonlocal calls
            if not self._handles:
                raise RuntimeError("ValueSharing: used outside of its context")
            if calls >= steps * evaluations:
                raise RuntimeError(
                    f"ValueSharing: {steps} steps of {evaluations} evaluations are over; wrap a velocity "
                    "anew for each run"
                )
            step, evaluation = divmod(calls, evaluations)
            calls += 1
            if role == "_store":
                step = steps - 1 - step  # counted from the noisiest
            setattr(self, role, (step, evaluation))
            try:
                return velocity(x, sigma)
            finally:
                setattr(self, role, None)

        return counted

    def _hook(self, key: tuple[str, int], part: Callable[[int], slice], out: Tensor) -> Tensor | None:
        if self._store is not None:
            if self._store[0] < self.inject:
                v = out[:, self._tokens(key[0]), part(out.shape[-1])].detach()
                kept = v.clone() if self.device is None else v.to(self.device, copy=True)
                self.values[(*key, *self._store)] = kept
            return None
        if self._load is None or self._load[0] >= self.inject:
            return None
        step, evaluation = self._load
        if self.matched_time and evaluation == 0:
            step -= 1
            if step < 0:
                return None
        stored = self.values.get((*key, step, evaluation))
        if stored is None:
            raise RuntimeError(
                f"ValueSharing: no V of {key[0]} at step {step}, evaluation {evaluation}: run an inversion "
                "with `storing` and as many steps and evaluations first"
            )
        return _replaced(out, stored, self._tokens(key[0]), part(out.shape[-1]), key[0])

    def _tokens(self, name: str) -> slice:
        return self.picture if self.picture is not None and self.streams[name] == 1 else slice(None)


def _replaced(out: Tensor, stored: Tensor, tokens: slice, part: slice, name: str) -> Tensor:
    """`out` with V of `stored`, for each of the batches that guidance puts side by side."""
    wanted = out[:, tokens, part].shape
    if stored.shape[1:] != wanted[1:] or wanted[0] % stored.shape[0]:
        raise ValueError(
            f"ValueSharing: V of {name} is {list(stored.shape)}, to replace {list(wanted)}: both runs "
            "need one size of picture, one length of text (or picture=), and whole multiples of the batch"
        )
    stored = stored.to(out.device, out.dtype).repeat(wanted[0] // stored.shape[0], 1, 1)
    if wanted == out.shape:
        return stored
    out = out.clone()
    out[:, tokens, part] = stored
    return out


def _chosen(
    layers: dict[str, list[Layer]], blocks: Iterable[str] | Callable[[int, str], bool] | None, model: str
) -> dict[str, list[Layer]]:
    if not layers:
        raise ValueError(f"ValueSharing: {model} has no self-attention that is known, see value_layers")
    if blocks is None:
        return layers
    if callable(blocks):
        chosen = {name: found for i, (name, found) in enumerate(layers.items()) if blocks(i, name)}
    else:
        names = list(blocks)
        unknown = [name for name in names if name not in layers]
        if unknown:
            known = ", ".join(layers)
            raise ValueError(f"ValueSharing: blocks must be among {known}, got {', '.join(unknown)}")
        chosen = {name: layers[name] for name in names}
    if not chosen:
        raise ValueError(f"ValueSharing: blocks must choose one of {', '.join(layers)}, got none")
    return chosen


def feature_bytes(
    tokens: int | Sequence[int],
    width: int,
    *,
    blocks: int,
    inject: int,
    evaluations: int = 2,
    batch: int = 1,
    element: int = 2,
) -> int:
    """Memory that `ValueSharing` takes: FLUX at 1024 x 1024 (4096 + 512 tokens of 3072), 18 blocks, 5: 5.1
    GB.

    Args:
        tokens: of one V, or of each stream.
        width: of a token.
        element: bytes of a number.
    """
    total = tokens if isinstance(tokens, int) else sum(tokens)
    return total * width * element * blocks * inject * evaluations * batch
