"""The regions of a block on awkward shapes: results, gradients and codes, for `smoke`."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rfkernels import ops

# one value; a ragged row; rows of whole packs over several warps; frames of a video
SHAPES = ((1, 1), (3, 13), (2, 5, 2048), (2, 3, 4, 80))
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
)
HEADS, D = 3, 12
# half a step of the code at the largest value of a row
CODES = {"int8": 0.05, "fp8": 0.08}

Results = Iterator[tuple[str, Tensor, Tensor, float]]  # name, ours, the definition in float64, tolerance


def results(shape: tuple[int, ...], tokens: torch.dtype, parameters: torch.dtype, device: str) -> Results:
    """All of them on tokens of `shape`."""
    draw = Draw(tokens, parameters, device)
    limit = 1e-5 if tokens == torch.float32 else 1e-2
    for name, ours, reference, tensors in _calls(shape, draw):
        yield from _both_ways(name, ours, reference, tensors, limit)
    for name, quantized, region, tensors in _quantizing(shape, draw):
        expected = region(*[t.double() for t in tensors])
        for format, step in CODES.items():
            *others, codes, scales = quantized(*tensors, format=format)
            values = codes.double() * scales.double()[..., None]
            yield f"{name} {format}", values, _tuple(expected)[-1], step
            for got, wanted in zip(others, _tuple(expected)[:-1], strict=True):
                yield f"{name} x'", got, wanted, limit


class Draw:
    """Random tokens and parameters."""

    def __init__(self, tokens: torch.dtype, parameters: torch.dtype, device: str):
        self.types, self.device = (tokens, parameters), device
        self.generator = torch.Generator().manual_seed(0)

    def tokens(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.types[0])

    def parameters(self, *shape: int) -> Tensor:
        return (0.5 + torch.rand(shape, generator=self.generator)).to(self.device, self.types[1])


def _both_ways(
    name: str, ours: Callable, reference: Callable, tensors: list[Tensor], limit: float
) -> Results:
    """The results and the gradients of a call."""
    tensors = [t.requires_grad_() for t in tensors]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    got, expected = _tuple(ours(*tensors)), _tuple(reference(*wide))
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        yield f"{name} result {i}", a.detach(), b.detach(), limit
    grads = [torch.ones_like(a) for a in got]
    mine = torch.autograd.grad(got, tensors, grads)
    theirs = torch.autograd.grad(expected, wide, [g.double() for g in grads])
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        yield f"{name} gradient {i}", a, b, 4 * limit  # of parameters it is a sum over tokens


def _calls(shape: tuple[int, ...], draw: Draw) -> Iterator[tuple[str, Callable, Callable, list[Tensor]]]:
    """Name, ours, the definition, and the tensors that both take."""
    width = shape[-1]
    x, y, both = draw.tokens(*shape), draw.tokens(*shape), draw.tokens(*shape[:-1], 2 * width)
    rows = [draw.parameters(shape[0], width) for _ in range(3)]
    weight, bias = draw.parameters(width), draw.parameters(width)
    groups = [draw.parameters(5, width) for _ in range(2)]
    index = torch.randint(5, shape[:-1], generator=draw.generator).to(draw.device)

    def norm(f: Callable) -> Callable:
        return lambda x, scale, shift, weight, bias: f(x, scale, shift, weight=weight, bias=bias)

    def indexed(f: Callable) -> Callable:
        return lambda x, scale, shift: f(x, scale, shift, index=index, norm="rms")

    def sandwich(f: Callable) -> Callable:
        options = {"gate_activation": "tanh", "branch_norm": "rms"}
        return lambda x, y, gate, weight: f(x, y, gate, branch_weight=weight, **options)

    norms, residuals = (
        (ops.norm_modulate, ops.norm_modulate_reference),
        (
            ops.gated_residual,
            ops.gated_residual_reference,
        ),
    )
    both_ops = (ops.gated_residual_norm_modulate, ops.gated_residual_norm_modulate_reference)
    yield "norm_modulate", *map(norm, norms), [x, *rows[:2], weight, bias]
    yield "norm_modulate, index", *map(indexed, norms), [x, *groups]
    yield "gated_residual", *map(sandwich, residuals), [x, y, rows[0], weight]
    yield "gated_residual_norm_modulate", *both_ops, [x, y, *rows]
    yield (
        "activation",
        lambda x, b: ops.activation(x, "gelu_tanh", bias=b),
        lambda x, b: ops.activation_reference(x, b, "gelu_tanh"),
        [x, bias],
    )
    yield (
        "gated_activation",
        lambda x: ops.gated_activation(x, "silu"),
        lambda x: ops.gated_activation_reference(x, None, None, None, "silu"),
        [both],
    )
    yield _qkv(shape, draw)
    times = 1000 * draw.parameters(shape[0]).float()
    angles = {torch.float64: ops.timestep_embedding_reference, torch.float32: ops.timestep_embedding}
    yield (
        "timestep_embedding",
        *[lambda t, f=f, d=d: f(t, 32, dtype=d) for d, f in angles.items()][::-1],
        [times],
    )


def _qkv(shape: tuple[int, ...], draw: Draw) -> tuple[str, Callable, Callable, list[Tensor]]:
    """Two streams, the second and the end of the first rotated."""
    lengths = (shape[-1] % 7 + 2, 3)
    streams = [draw.tokens(shape[0], length, 3 * HEADS * D) for length in lengths]
    weights = [draw.parameters(D) for _ in range(2)]
    table = ops.rotary_table(torch.arange(4)[:, None], (D,), dtype=torch.float64).to(draw.device)

    def ours(text: Tensor, image: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        rotation = {"rotation": table.float(), "rotate_from": lengths[0] - 1}
        return ops.qkv_norm_rope([text, image], HEADS, q_weight=q, k_weight=k, **rotation)

    def definition(text: Tensor, image: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        numbers = (1, HEADS, HEADS, lengths[0] - 1, 1e-6)
        return ops.qkv_norm_rope_reference([text, image], [q, k, q, k], table, *numbers)

    return "qkv_norm_rope", ours, definition, [*streams, *weights]


def _quantizing(shape: tuple[int, ...], draw: Draw) -> Iterator[tuple[str, Callable, Callable, list[Tensor]]]:
    """Name, ours, the definition of what is encoded, and the tensors that both take."""
    width = shape[-1]
    x, y, both = draw.tokens(*shape), draw.tokens(*shape), draw.tokens(*shape[:-1], 2 * width)
    rows = [draw.parameters(shape[0], width) for _ in range(3)]
    rotation = 16 if width % 16 == 0 else 0

    def rotated(x: Tensor) -> Tensor:
        if not rotation:
            return x
        matrix = ops.rotation_matrix(rotation).to(x.device)
        return (x.unflatten(-1, (-1, rotation)) @ matrix).flatten(-2)

    yield (
        "quantize",
        lambda x, format: ops.quantize(x, format, rotation=rotation),
        rotated,
        [x],
    )
    yield "norm_modulate_quantize", ops.norm_modulate_quantize, ops.norm_modulate_reference, [x, *rows[:2]]
    yield (
        "gated_residual_norm_modulate_quantize",
        ops.gated_residual_norm_modulate_quantize,
        ops.gated_residual_norm_modulate_reference,
        [x, y, *rows],
    )
    yield (
        "activation_quantize",
        lambda x, format: ops.activation_quantize(x, "gelu", format=format),
        lambda x: ops.activation_reference(x, None, "gelu"),
        [x],
    )
    yield (
        "gated_activation_quantize",
        lambda x, format: ops.gated_activation_quantize(x, "silu", format=format),
        lambda x: ops.gated_activation_reference(x, None, None, None, "silu"),
        [both],
    )


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
