"""Linear layers: every format with quantising, epilogue and low-rank branch, beside torch's products."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, nbytes, random_tensor
from bench.gguf_blocks import random_blocks

# tokens, inputs, outputs
SHAPES = {
    "1536 square": (1024, 1536, 1536),
    "1536 MLP": (1024, 1536, 6144),
    "3072 square": (1024, 3072, 3072),
    "FLUX.1 attention": (4608, 3072, 3072),
    "FLUX.1 modulation": (1, 3072, 18432),
    "small": (64, 256, 256),
}
FULL = [
    *[
        (op, label)
        for label in list(SHAPES)[:2]
        for op in ("int8", "int8 lora", "w4a16", "w4a8", "fp8", "plain")
    ],
    ("gguf", "3072 square"),
    ("int8", "FLUX.1 attention"),
    ("int8 lora", "FLUX.1 attention"),
    ("w4a16", "FLUX.1 modulation"),
    ("gguf", "FLUX.1 modulation"),
    ("int8", "FLUX.1 modulation"),
    ("plain", "FLUX.1 modulation"),
    ("int8 lora", "small"),
]
QUICK = [("int8 lora", "small"), ("w4a16", "small"), ("gguf", "small")]
RANKS = (16, 64)


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    """The room's cases; bfloat16 tokens and results, a bias everywhere."""
    make = {
        "int8": _int8,
        "int8 lora": _int8_lora,
        "w4a16": _w4a16,
        "w4a8": _w4a8,
        "fp8": _fp8,
        "gguf": _gguf,
        "plain": _plain,
    }
    for op, label in QUICK if quick else FULL:
        yield from make[op](label, SHAPES[label], device)


def _case(
    op: str,
    label: str,
    shape: tuple[int, int, int],
    product: str,
    inputs: Callable[[], tuple[Tensor, ...]],
    ours: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    peers: dict[str, Callable[..., Tensor]],
) -> Case:
    m, k, n = shape
    few = m <= 8  # bound by the weight's bytes, not by arithmetic
    moved = sum(t.nbytes for t in inputs()) + nbytes(m * n, torch.bfloat16)
    return Case(
        room="linear",
        op=op,
        label=f"{label} {m}x{k}",
        shape=(m, n),
        dtypes="bf16",
        bytes_moved=moved,
        inputs=inputs,
        ours=lambda out, *tensors: ours(*tensors),
        formula=formula,
        has_out=False,
        operations=0 if few else 2 * m * k * n,
        product=product,
        peers=peers,
        tolerance=0.3,  # of values of order one to ten: eager dequantises in 16 bits
    )


def _tokens(shape: tuple[int, int, int], device: str) -> tuple[Tensor, Tensor]:
    """x and a bias."""
    m, k, n = shape
    return random_tensor((m, k), torch.bfloat16, device, 3), random_tensor((n,), torch.bfloat16, device, 4)


def _weight(shape: tuple[int, int, int], device: str) -> Tensor:
    _, k, n = shape
    return (random_tensor((n, k), torch.float32, device, 5) * k**-0.5).to(torch.bfloat16)


def _torch_products(shape: tuple[int, int, int], device: str) -> dict[str, Callable[..., Tensor]]:
    """torch's integer product of codes that are there, without any epilogue, and its bfloat16 layer."""
    m, k, n = shape
    codes, weight8 = (random_tensor(s, torch.int8, device, 6) for s in ((m, k), (n, k)))
    weight = _weight(shape, device)
    peers: dict[str, Callable[..., Tensor]] = {"torch bf16": lambda x, *_: F.linear(x, weight)}
    if m > 16:
        peers["torch._int_mm alone"] = lambda *_: torch._int_mm(codes, weight8.T)
    return peers


def _int8(label: str, shape: tuple[int, int, int], device: str) -> Iterator[Case]:
    from rfkernels import ops

    def inputs():
        x, bias = _tokens(shape, device)
        return x, *ops.quantize(_weight(shape, device)), bias

    def formula(x, codes, scale, bias):
        return F.linear(x, (codes * scale[:, None]).to(x.dtype), bias)

    peers = _torch_products(shape, device)
    yield _case("linear_int8", label, shape, "int8", inputs, ops.linear_int8, formula, peers)


def _int8_lora(label: str, shape: tuple[int, int, int], device: str) -> Iterator[Case]:
    """Beside our layer without the branch, and with the branch added as peft adds it."""
    from rfkernels import ops

    for rank in RANKS:

        def inputs(rank=rank):
            x, bias = _tokens(shape, device)
            down = random_tensor((rank, shape[1]), torch.bfloat16, device, 8) * shape[1] ** -0.5
            up = random_tensor((shape[2], rank), torch.bfloat16, device, 9) * rank**-0.5
            strength = torch.ones(rank, device=device)
            return x, *ops.quantize(_weight(shape, device)), bias, down, up, strength

        def ours(x, codes, scale, bias, down, up, strength):
            return ops.linear_int8(x, codes, scale, bias, lora=(ops.lora_shrink(x, down, strength), up))

        def added(x, codes, scale, bias, down, up, strength):
            return ops.linear_int8(x, codes, scale, bias) + F.linear(F.linear(x, down), up) * 1.0

        def formula(x, codes, scale, bias, down, up, strength):
            return F.linear(x, (codes * scale[:, None]).to(x.dtype), bias) + F.linear(F.linear(x, down), up)

        peers = {
            "without the branch": lambda x, codes, scale, bias, *_: ops.linear_int8(x, codes, scale, bias),
            "branch added in torch": added,
        }
        yield _case(f"linear_int8 + LoRA {rank}", label, shape, "int8", inputs, ours, formula, peers)


def _four_bits(shape: tuple[int, int, int], device: str, group: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of the weight."""
    from rfkernels import ops

    _, k, n = shape
    weight = _weight(shape, device).float().view(n, k // group, group)
    scale = weight.abs().amax(-1) / 7
    codes = (weight / scale[..., None]).round().clamp(-7, 7) + 8
    return ops.pack_int4(codes.view(n, k)), scale


def _dequantised(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    from rfkernels import ops

    return F.linear(x, ops.dequantize_weight(codes, scale).to(x.dtype), bias)


def _w4a16(label: str, shape: tuple[int, int, int], device: str) -> Iterator[Case]:
    from rfkernels import ops

    def inputs():
        x, bias = _tokens(shape, device)
        return x, *_four_bits(shape, device, 64), bias

    def ours(x, codes, scale, bias):
        return ops.linear_w4a16(x, codes, scale, None, bias)

    peers = _torch_products(shape, device)
    yield _case("linear_w4a16 g64", label, shape, "bf16", inputs, ours, _dequantised, peers)


def _w4a8(label: str, shape: tuple[int, int, int], device: str) -> Iterator[Case]:
    from rfkernels import ops

    for group in (64, shape[1]):

        def inputs(group=group):
            x, bias = _tokens(shape, device)
            return x, *_four_bits(shape, device, group), bias

        name = "linear_w4a8 " + ("g64" if group == 64 else "rows")
        peers = _torch_products(shape, device)
        yield _case(name, label, shape, "int8", inputs, ops.linear_w4a8, _dequantised, peers)


def _fp8(label: str, shape: tuple[int, int, int], device: str) -> Iterator[Case]:
    from rfkernels import ops

    def inputs():
        x, bias = _tokens(shape, device)
        return x, *ops.quantize(_weight(shape, device), "fp8"), bias

    def formula(x, codes, scale, bias):
        return F.linear(x, (codes.float() * scale[:, None]).to(x.dtype), bias)

    peers = _torch_products(shape, device)
    yield _case("linear_fp8", label, shape, "bf16", inputs, ops.linear_fp8, formula, peers)


def _gguf(label: str, shape: tuple[int, int, int], device: str) -> Iterator[Case]:
    """Beside torch on the weight as numbers; eager expands the blocks in torch, as diffusers does."""
    from rfkernels import ops

    for kind in ("Q4_K", "Q8_0"):

        def inputs(kind=kind):
            x, bias = _tokens(shape, device)
            return x, random_blocks(kind, shape[2], shape[1]).to(device), bias

        def ours(x, blocks, bias, kind=kind):
            return ops.linear_gguf(x, blocks, kind, bias)

        def formula(x, blocks, bias, kind=kind):
            return F.linear(x, ops.dequantize_gguf_reference(blocks, kind, x.dtype), bias)

        peers = _torch_products(shape, device)
        yield _case(f"linear_gguf {kind}", label, shape, "bf16", inputs, ours, formula, peers)


def _plain(label: str, shape: tuple[int, int, int], device: str) -> Iterator[Case]:
    """With the whole epilogue; torch does it in passes."""
    from rfkernels import ops

    m, _, n = shape

    def inputs():
        x, bias = _tokens(shape, device)
        gate, residual = (
            random_tensor((1, n), torch.bfloat16, device, 10),
            random_tensor((m, n), torch.bfloat16, device, 11),
        )
        return x, _weight(shape, device), bias, gate, residual

    def ours(x, weight, bias, gate, residual):
        return ops.linear(x, weight, bias, activation="gelu_tanh", gate=gate, residual=residual)

    def formula(x, weight, bias, gate, residual):
        return residual + gate * F.gelu(F.linear(x, weight, bias), approximate="tanh")

    yield _case("linear gelu gate residual", label, shape, "bf16", inputs, ours, formula, {})
