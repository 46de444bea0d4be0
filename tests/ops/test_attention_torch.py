"""Attention and torch: registration, compilation, memory."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from rfkernels import ops
from rfkernels.ops._attention import run_attention
from tests.ops.attention_cases import simple
from tests.ops.cases import BF16, F32, F64, every_device


def arguments(form: str, device: str) -> tuple:
    """The arguments of the registered op."""
    dtype = {"float64": F64, "bfloat16": BF16}.get(form, F32)
    call = simple((2, 4, 2, 9, 70, 8), dtype, device)
    q, k, v = call.q, call.k, call.v
    others, precision = [None] * 8, form if form in ("int8", "fp8", "auto") else "full"
    integers = lambda *values: torch.tensor(values, dtype=torch.int32, device=device)
    if form in ("float64", "everything", "int8"):
        wide = F64 if dtype == F64 else F32
        others[0] = torch.randn(1, 4, 9, 70, device=device, dtype=wide)
        others[1] = torch.randn(4, 78, device=device, dtype=wide)
        others[2] = integers(70, 3)
        others[5] = torch.ones(1, 1, 1, 2, dtype=torch.uint8, device=device)
        others[6] = integers(1, 0)
    if form == "int8":
        others[7] = ops.key_mean(k)
    if form == "packed":
        q, k, v = (t[:1] for t in (q, k, v))
        others[3], others[4] = integers(0, 4, 4, 9), integers(0, 30, 33, 70)
    if form == "tokens first":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    return (q, k, v, *others, 0.3, 2 if others[6] is not None else 1, precision)


FORMS = ["plain", "float64", "bfloat16", "everything", "packed", "tokens first", "int8", "fp8", "auto"]


@every_device
@pytest.mark.parametrize("form", FORMS)
def test_op_obeys_torch(form, device):
    args = arguments(form, device)
    torch.library.opcheck(run_attention.functional, args)
    out = tuple(torch.empty_like(t) for t in run_attention.functional(*args))
    torch.library.opcheck(run_attention.out_variant, (*out, *args))
    if form == "packed":  # its gradient reads the starts on the host, which no graph can hold
        return
    floating = tuple(
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in args
    )
    torch.library.opcheck(run_attention.functional, floating)


@every_device
@pytest.mark.parametrize("form", ["plain", "everything", "packed", "tokens first"])
def test_an_empty_result_is_like_a_real_one(form, device):
    args = arguments(form, device)
    for empty, result in zip(run_attention.empty(*args), run_attention(*args), strict=True):
        assert (
            empty.shape == result.shape and empty.stride() == result.stride() and empty.dtype == result.dtype
        )


def step(q, k, v, *, options, precision="full", layout="bhld"):
    out, lse = ops.attention(q * 2, k, v, return_lse=True, precision=precision, layout=layout, **options)
    return out * 2, lse


OPTIONS = {
    "plain": lambda device: {},
    "bias": lambda device: {"bias": torch.randn(1, 4, 9, 70, device=device)},
    "mask": lambda device: {"bias": torch.rand(2, 1, 1, 70, device=device) > 0.5},
    "padding and shift": lambda device: {
        "key_lengths": torch.randint(1, 70, (2,), device=device),
        "head_shift": torch.tensor([1, -1], device=device),
        "frames": 2,
    },
    "factor, blocks": lambda device: {
        "factor": torch.randn(4, 78, device=device),
        "block_mask": torch.ones(1, 1, 1, 2, dtype=torch.bool, device=device),
    },
}


@every_device
@pytest.mark.parametrize("precision", ["full", "int8", "auto"])
@pytest.mark.parametrize("options", OPTIONS)
def test_compiles_without_graph_breaks_once(options, precision, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seed in range(3):  # other values, the same graph
        call = simple((2, 4, 2, 9, 70, 8), F32, device, seed)
        named = {"options": OPTIONS[options](device), "precision": precision}
        for mine, other in zip(
            compiled(call.q, call.k, call.v, **named), step(call.q, call.k, call.v, **named), strict=True
        ):
            assert torch.equal(mine, other)
    assert counter.frame_count == 1


@every_device
def test_compiles_with_dynamic_shapes(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for length in (9, 33, 70, 300):
        call = simple((2, 4, 2, length, length + 5, 8), F32, device)
        q, k, v = (t.transpose(1, 2) for t in (call.q, call.k, call.v))
        named = {"options": {"key_lengths": torch.tensor([length, 2], device=device)}, "layout": "blhd"}
        for mine, other in zip(compiled(q, k, v, **named), step(q, k, v, **named), strict=True):
            assert torch.equal(mine, other) and mine.stride() == other.stride()
    assert counter.frame_count == 1


@every_device
def test_compiles_packed_sequences(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    tokens = torch.randn(30, 2, 8, device=device)
    for starts in ([0, 10, 30], [0, 0, 30], [0, 29, 30]):
        options = {"cu_seqlens": torch.tensor(starts, device=device)}
        for mine, other in zip(
            compiled(tokens, tokens, tokens, options=options),
            step(tokens, tokens, tokens, options=options),
            strict=True,
        ):
            assert torch.equal(mine, other)
    assert counter.frame_count == 1


@every_device
@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_compile(dynamic, device):
    torch._dynamo.reset()

    def loss(q, k, v, bias):
        out, lse = ops.attention(q, k, v, bias=bias, return_lse=True)
        return (out * out).sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (9, 17) if dynamic else (9,):
        call = simple((2, 4, 2, rows, 70, 8), F32, device)
        tensors = [
            t.requires_grad_() for t in (call.q, call.k, call.v, torch.randn(1, 4, rows, 70, device=device))
        ]
        torch.testing.assert_close(
            torch.autograd.grad(compiled(*tensors), tensors), torch.autograd.grad(loss(*tensors), tensors)
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["full", "int8", "fp8", "auto"])
def test_a_captured_graph_follows_new_values(precision):
    call = simple((2, 4, 2, 300, 300, 64), BF16, "cuda")
    lengths = torch.tensor([300, 20], device="cuda", dtype=torch.int32)
    run = lambda: call.run(precision, key_lengths=lengths)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    call.q.copy_(torch.randn_like(call.q))
    lengths.copy_(torch.tensor([1, 257]))
    graph.replay()
    for mine, other in zip(results, run(), strict=True):
        assert torch.equal(mine, other)


PROGRAM = """
import resource, sys
import torch
from rfkernels import ops

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

def call(length, backward):
    q = torch.randn(1, 2, length, 64, dtype=torch.bfloat16, requires_grad=backward)
    out = ops.attention(q, q, q, precision=sys.argv[1])
    if backward:
        out.sum().backward()

backward = sys.argv[1] == "full" and sys.argv[2] == "backward"
call(256, backward)
before = peak()
length = 4096 if backward else 8192
call(length, backward)
print(peak() - before)
"""


@pytest.mark.parametrize("what", ["full forward", "int8 forward", "auto forward", "full backward"])
def test_memory_grows_with_the_tokens(what):
    result = subprocess.run([sys.executable, "-c", PROGRAM, *what.split()], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    scores = 2 * (4096 if "backward" in what else 8192) ** 2 * 4 >> 20  # MiB that all of them would take
    assert int(result.stdout) < scores * (1 if "backward" in what else 0.1)
