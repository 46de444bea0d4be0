"""Blocks of whole models, accelerated in place, beside diffusers' own on the same weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from bench.cases import Case, nbytes, random_tensor

BFLOAT16 = torch.bfloat16


@dataclass(frozen=True)
class Block:
    """A block at a size: `build()` its module, `call(block, angles, *inputs)` a result of its forward."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]  # of the inputs, the first that of the result
    call: Callable[..., Tensor]
    heads: tuple[int, int]  # heads, channels of a head
    attended: tuple[tuple[int, int], ...]  # queries and keys of each attention
    products: Callable[[nn.Module], int]  # multiplications of the linear layers
    angles: Callable[[], tuple[Tensor, ...]] = tuple  # of positions, as the block takes them
    wide: tuple[int, ...] = ()  # inputs in float32

    def operations(self, module: nn.Module) -> int:
        heads, channels = self.heads
        return 2 * self.products(module) + sum(4 * q * k * heads * channels for q, k in self.attended)


def _diffusers(module: str, name: str):
    return getattr(import_module(f"diffusers.models.{module}"), name)


def _weights(module: nn.Module, names: str) -> int:
    """Weights of the linear layers whose names have one of the words."""
    words = names.split()
    layers = ((n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear))
    return sum(m.weight.numel() for n, m in layers if any(w in n for w in words))


def _cos_sin(tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    """Angles of positions, every one twice, as diffusers hands them to blocks."""
    angle = torch.outer(torch.arange(tokens), 1e4 ** -(torch.arange(0, channels, 2) / channels))
    return tuple(t.repeat_interleave(2, 1) for t in (angle.cos(), angle.sin()))


CONTEXT = "add_ to_add context"


def flux(single: bool, image: int, text: int, heads: int = 24, channels: int = 128) -> Block:
    width, tokens = heads * channels, image + text
    name = "FluxSingleTransformerBlock" if single else "FluxTransformerBlock"

    def products(module: nn.Module) -> int:
        if single:
            return tokens * _weights(module, "attn proj") + _weights(module, "norm")
        context = _weights(module, CONTEXT) - _weights(module, "norm1_context")
        modulation = _weights(module, "norm1")
        every = _weights(module, "attn ff")
        return image * (every - context) + text * context + modulation

    return Block(
        lambda: _diffusers("transformers.transformer_flux", name)(width, heads, channels),
        ((1, image, width), (1, text, width), (1, width)),
        lambda block, angles, x, c, temb: block(x, c, temb, angles)[1],
        (heads, channels),
        ((tokens, tokens),),
        products,
        lambda: _cos_sin(tokens, channels),
    )


def sd3(image: int, text: int, heads: int = 24, channels: int = 64) -> Block:
    width = heads * channels

    def build() -> nn.Module:
        options = {"qk_norm": "rms_norm", "use_dual_attention": True}
        return _diffusers("attention", "JointTransformerBlock")(width, heads, channels, **options)

    def products(module: nn.Module) -> int:
        context = _weights(module, CONTEXT) - _weights(module, "norm1_context")
        every = _weights(module, "attn ff")
        return image * (every - context) + text * context + _weights(module, "norm1")

    return Block(
        build,
        ((1, image, width), (1, text, width), (1, width)),
        lambda block, _, x, c, temb: block(x, c, temb)[1],
        (heads, channels),
        ((image + text, image + text), (image, image)),
        products,
    )


def wan(tokens: int, text: int = 512, heads: int = 12, channels: int = 128, hidden: int = 8960) -> Block:
    width = heads * channels

    def products(module: nn.Module) -> int:
        keys = _weights(module, "attn2.to_k attn2.to_v")
        return tokens * (_weights(module, "attn ffn") - keys) + text * keys

    return Block(
        lambda: _diffusers("transformers.transformer_wan", "WanTransformerBlock")(
            width, hidden, heads, cross_attn_norm=True
        ),
        ((1, tokens, width), (1, text, width), (1, 6, width)),
        lambda block, angles, x, c, temb: block(x, c, temb, angles),
        (heads, channels),
        ((tokens, tokens), (tokens, text)),
        products,
        lambda: tuple(t[None, :, None] for t in _cos_sin(tokens, channels)),
        wide=(2,),
    )


def zimage(tokens: int, heads: int = 30, channels: int = 128) -> Block:
    width = heads * channels

    def build() -> nn.Module:
        block = _diffusers("transformers.transformer_z_image", "ZImageTransformerBlock")
        return block(0, width, heads, heads, 1e-5, True)

    def angles() -> tuple[Tensor]:
        cos, sin = (t[:, ::2] for t in _cos_sin(tokens, channels))
        return (torch.complex(cos, sin)[None],)

    return Block(
        build,
        ((1, tokens, width), (1, 256)),
        lambda block, angles, x, temb: block(x, None, *angles, temb),
        (heads, channels),
        ((tokens, tokens),),
        lambda module: tokens * _weights(module, "attention feed_forward") + _weights(module, "adaLN"),
        angles,
    )


def flux_step(image: int = 4096, text: int = 512, heads: int = 24, channels: int = 128) -> Block:
    """A whole step of FLUX.1 dev, whose graph `accelerate` replays on CUDA."""
    options = {"attention_head_dim": channels, "num_attention_heads": heads, "guidance_embeds": True}
    double, single = flux(False, image, text, heads, channels), flux(True, image, text, heads, channels)

    def call(model: nn.Module, ids: tuple[Tensor, ...], x: Tensor, c: Tensor, pooled: Tensor) -> Tensor:
        t, guidance, img_ids, txt_ids = ids
        return model(x, c, pooled, t, img_ids, txt_ids, guidance, return_dict=False)[0]

    def products(model: nn.Module) -> int:
        blocks = sum(map(double.products, model.transformer_blocks))
        return blocks + sum(map(single.products, model.single_transformer_blocks))

    def ids() -> tuple[Tensor, ...]:
        grid = torch.stack([torch.zeros(image), torch.arange(image) // 64, torch.arange(image) % 64], 1)
        return torch.tensor([0.5]), torch.tensor([4.0]), grid, torch.zeros(text, 3)

    return Block(
        lambda: _diffusers("transformers.transformer_flux", "FluxTransformer2DModel")(**options),
        ((1, image, 64), (1, text, 4096), (1, 768)),
        call,
        (heads, channels),
        ((image + text, image + text),) * 57,
        products,
        ids,
    )


BLOCKS = {
    "FLUX.1 double": flux(False, 4096, 512),
    "FLUX.1 single": flux(True, 4096, 512),
    "SD3.5 medium": sd3(4096, 333),
    "Wan 1.3B": wan(7800),  # 480p, 17 frames
    "Z-Image": zimage(4224),
}
QUICK = {"small FLUX.1 double": flux(False, 64, 32, 2, 64), "small FLUX.1 single": flux(True, 64, 32, 2, 64)}
QUANTISED = "int8"
TOLERANCE = {"": 0.1, QUANTISED: 0.5}  # of values of order one, in bfloat16


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    """Every block in bfloat16, and with int8 layers and attention; on CUDA a step. None without diffusers."""
    if find_spec("diffusers") is None:
        return
    whole = {"FLUX.1 step": flux_step()} if device == "cuda" else {}
    for label, block in (QUICK if quick else BLOCKS | whole).items():
        for method in ("", QUANTISED):
            yield _case(label, block, method, device)


class Pair:
    """A block of diffusers and ours on the same weights, made when they are needed."""

    def __init__(self, block: Block, method: str, device: str):
        self.block, self.method, self.device = block, method, device
        self.theirs = self.ours = None
        self.angles: tuple[Tensor, ...] = ()

    def make(self) -> None:
        import rfkernels

        torch.manual_seed(0)
        self.angles = tuple(t.to(self.device) for t in self.block.angles())
        with torch.device(self.device):
            self.theirs = self.block.build().to(BFLOAT16).eval().requires_grad_(False)
        for part in ("scale_shift_table", "norm2"):
            _widen(self.theirs, part)
        with torch.device("meta"):
            ours = self.block.build().eval().requires_grad_(False)
        ours.load_state_dict(self.theirs.state_dict(), assign=True)
        self.ours = rfkernels.accelerate(ours, quant=self.method or None, reversible=False)

    def inputs(self) -> tuple[Tensor, ...]:
        if self.theirs is None:
            self.make()
        shapes, wide = self.block.shapes, self.block.wide
        kinds = (torch.float32 if i in wide else BFLOAT16 for i in range(len(shapes)))
        return tuple(
            random_tensor(shape, kind, self.device, i)
            for i, (shape, kind) in enumerate(zip(shapes, kinds, strict=True))
        )


def _case(label: str, block: Block, method: str, device: str) -> Case:
    pair, shape = Pair(block, method, device), block.shapes[0]
    with torch.device("meta"):
        operations = block.operations(block.build())
    elements = sum(torch.Size(s).numel() for s in (*block.shapes, shape))
    elements += sum(torch.Size(block.shapes[i]).numel() for i in block.wide)
    return Case(
        room="models",
        op=f"{label} {method}".strip(),
        label=label,
        shape=shape,
        dtypes="bf16",
        bytes_moved=nbytes(elements, BFLOAT16),
        inputs=pair.inputs,
        ours=lambda out, *tensors: block.call(pair.ours, pair.angles, *tensors),
        formula=lambda *tensors: block.call(pair.theirs, pair.angles, *tensors),
        has_out=False,
        operations=operations,
        product=method or "bf16",
        tolerance=TOLERANCE[method],
    )


def _widen(module: nn.Module, name: str) -> None:
    """Wan's table and affine norm stay float32 beside 16-bit tokens."""
    part = getattr(module, name, None)
    if isinstance(part, nn.Parameter):
        part.data = part.data.float()
    elif isinstance(part, nn.Module):
        part.float()
