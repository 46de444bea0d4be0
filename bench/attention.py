"""Attention in every precision beside torch's, quantisation included; packed sequences beside padded ones."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import DTYPES, Case, nbytes, random_tensor

# batch, heads, tokens, channels of a head
SHAPES = {
    "12 heads": (1, 12, 1024, 64),
    "24 heads": (1, 24, 1536, 128),
    "16 heads": (2, 16, 256, 72),
    "FLUX.1": (1, 24, 4608, 128),
    "SD3.5 large": (1, 38, 4429, 64),
    "Wan 480p 81 frames": (1, 12, 32760, 128),
    "small": (1, 4, 256, 64),
}
ON_CPU = ("12 heads", "24 heads", "16 heads", "FLUX.1", "small")
ON_GPU = ("FLUX.1", "SD3.5 large", "Wan 480p 81 frames", "small")
# name of the case: the dtype of its tensors, `precision`, the arithmetic whose peak is its roof
FORMS = {
    "f32": ("f32", "full", "f32"),
    "bf16": ("bf16", "full", "bf16"),
    "int8": ("bf16", "int8", "int8"),
    "fp8": ("bf16", "fp8", "bf16"),  # on a CPU the second product is one of 16-bit numbers
}
LENGTHS = (200, 310, 420, 540, 650, 770, 880, 1000)  # of packed sequences
HEADS, CHANNELS = 12, 64  # of theirs
# of means of n normal numbers, in units of 1 / sqrt(n): what roundings of 16 and of 8 bits explain
TOLERANCE = {"f32": 2e-4, "bf16": 0.1, "int8": 0.3, "fp8": 0.3}


def cases(device: str, quick: bool = False) -> Iterator[Case]:
    """The room's cases; on a GPU those of 16-bit tensors."""
    labels = ("small",) if quick else ON_GPU if device == "cuda" else ON_CPU
    forms = [name for name, (dtypes, *_) in FORMS.items() if device == "cpu" or dtypes == "bf16"]
    for label in labels:
        for form in forms:
            yield _dense(form, label, device)
    if not quick:
        for form in ("bf16", "int8"):
            yield _packed(form, device)


def _dense(form: str, label: str, device: str) -> Case:
    from rfkernels import ops

    shape = SHAPES[label]
    batch, heads, tokens, d = shape
    dtypes, precision, product = FORMS[form]
    dtype = DTYPES[dtypes][0]
    return Case(
        room="attention",
        op=f"attention {form}",
        label=label,
        shape=shape,
        dtypes=dtypes,
        bytes_moved=4 * nbytes(batch * heads * tokens * d, dtype),
        inputs=lambda: tuple(random_tensor(shape, dtype, device, seed) for seed in range(3)),
        ours=lambda out, q, k, v: ops.attention(q, k, v, precision=precision),
        formula=F.scaled_dot_product_attention,
        has_out=False,
        operations=4 * batch * heads * tokens * tokens * d,
        product=product,
        peers=_peers(shape, form, device),
        tolerance=TOLERANCE[form] * tokens**-0.5,
    )


def _peers(shape: tuple[int, ...], form: str, device: str) -> dict[str, Callable[..., Tensor]]:
    """torch's attention in the other dtype; on a GPU the kernels that one can choose."""
    if device == "cpu":
        name, other = ("torch bf16", torch.bfloat16) if form == "f32" else ("torch f32", torch.float32)
        tensors = [random_tensor(shape, other, device, seed) for seed in range(3)]
        return {name: lambda *_: F.scaled_dot_product_attention(*tensors)}
    peers = {"torch cuDNN": _cudnn}
    if form == "bf16":
        peers["our portable kernel"] = _portable
    if find_spec("sageattention"):
        from sageattention import sageattn

        peers["sageattention"] = sageattn
    return peers


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def _portable(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ours where plain calls go to cuDNN: one that returns the logarithms of the sums does not."""
    from rfkernels import ops

    return ops.attention(q, k, v, return_lse=True)[0]


def _packed(form: str, device: str) -> Case:
    """Sequences of 200 to 1000 tokens; the peers have them padded to the longest."""
    from rfkernels import ops

    dtypes, precision, product = FORMS[form]
    shape = (sum(LENGTHS), HEADS, CHANNELS)
    starts = torch.tensor((0, *LENGTHS), device=device).cumsum(0).to(torch.int32)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    longest = (len(LENGTHS), HEADS, max(LENGTHS), CHANNELS)
    padded = [random_tensor(longest, torch.bfloat16, device, seed) for seed in range(3)]
    mask = torch.arange(max(LENGTHS), device=device) < lengths[:, None, None, None]
    return Case(
        room="attention",
        op=f"attention {form} packed",
        label="200 to 1000 tokens",
        shape=shape,
        dtypes=dtypes,
        bytes_moved=4 * nbytes(torch.Size(shape).numel(), torch.bfloat16),
        inputs=lambda: tuple(random_tensor(shape, torch.bfloat16, device, seed) for seed in range(3)),
        ours=lambda out, q, k, v: ops.attention(q, k, v, cu_seqlens=starts, precision=precision),
        formula=_one_by_one,
        has_out=False,
        operations=4 * HEADS * CHANNELS * sum(n * n for n in LENGTHS),
        product=product,
        peers={
            "ours padded": lambda *_: ops.attention(*padded, key_lengths=lengths, precision=precision),
            "torch padded": lambda *_: F.scaled_dot_product_attention(*padded, attn_mask=mask),
        },
        tolerance=TOLERANCE[form] * min(LENGTHS) ** -0.5,
    )


def _one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A loop over the sequences."""
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).tolist()
    own = [tuple(t[i:j].transpose(0, 1) for t in (q, k, v)) for i, j in pairwise(ends)]
    return torch.cat([F.scaled_dot_product_attention(*t).transpose(0, 1) for t in own])
