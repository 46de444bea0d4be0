"""Calls of attention that must be refused, each with its message."""

import pytest
import torch

from rfkernels import ops
from rfkernels.ops._attention import run_attention
from tests.ops.cases import BF16, F16, F64

Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 70, 8)
I32 = torch.int32
NAMES = ["bias", "factor", "key_lengths", "q_starts", "k_starts", "block_mask", "head_shift", "key_mean"]


def call(q=Q, k=K, v=None, scale=0.5, frames=1, precision="full", out=None, **named):
    """The registered op."""
    values = [named.get(name) for name in NAMES]
    return run_attention(q, k, k if v is None else v, *values, scale, frames, precision, out=out)


def starts(*values, dtype=I32):
    return torch.tensor(values, dtype=dtype)


def result(lse=None, **changes):
    """out= of the call, with something else in it."""
    out = changes.get("out", torch.zeros(2, 4, 5, 8))
    return {"out": (out, torch.zeros(2, 4, 5) if lse is None else lse)}


PACKED = {"q": Q[:1], "k": K[:1], "q_starts": starts(0, 2, 5), "k_starts": starts(0, 30, 70)}
BIAS = r"bias must be \[2 or 1, 4 or 1, 5 or 1, 70\] with neighbours along the keys adjacent"
BLOCKS = r"block_mask must be bool \[2 or 1, 4 or 1, 1, 2\], blocks of 128 rows and 64 keys"
FACTOR = r"factor must be contiguous f32\[4 or 1, 74\]"
ALONE = "cu_seqlens goes with a batch of 1 and without bias, factor, key_lengths, block_mask and head_shift"
AXES = r"q, k and v must be \[batch, heads, tokens, d\]"
TOKENS = r"k and v must be \[batch, kv_heads, keys, d\] of the dtype and device of q f32\[2, 4, 5, 8\]"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"q": torch.zeros(4, 5, 8)}, "axes|q, k and v must be|Dimension out of range"),
        ({"k": torch.zeros(2, 70, 8)}, AXES),
        ({"v": torch.zeros(2, 70, 8)}, AXES),
        ({"q": Q.to(torch.int32)}, r"q must be floating \[batch, heads, rows, d\]"),
        ({"q": torch.zeros(2, 4, 8, 5).mT}, "neighbours along d adjacent"),
        ({"q": torch.zeros(2, 4, 5, 257)}, r"d must be 1\.\.256, got 257"),
        ({"q": torch.zeros(2, 4, 5, 0), "k": torch.zeros(2, 2, 70, 0)}, r"d must be 1\.\.256, got 0"),
        ({"k": torch.zeros(3, 2, 70, 8)}, TOKENS),
        ({"k": torch.zeros(2, 2, 70, 9)}, TOKENS),
        ({"k": K.to(BF16)}, TOKENS),
        ({"v": torch.zeros(2, 2, 69, 8)}, TOKENS),
        ({"v": torch.zeros(2, 4, 70, 8)}, TOKENS),
        ({"v": torch.zeros(2, 2, 8, 70).mT}, TOKENS),
        ({"k": torch.zeros(2, 3, 70, 8)}, "the heads of k must divide those of q"),
        ({"k": torch.zeros(2, 8, 70, 8)}, "the heads of k must divide those of q"),
        ({"k": torch.zeros(2, 0, 70, 8)}, "the heads of k must divide those of q|integer"),
        ({"scale": float("inf")}, "scale must be finite, got inf"),
        ({"scale": float("nan")}, "scale must be finite"),
        (
            result(out=torch.zeros(2, 4, 6, 8)),
            r"out must be like q f32\[2, 4, 5, 8\] cpu, got f32\[2, 4, 6, 8\]",
        ),
        (result(out=torch.zeros(2, 4, 5, 8, dtype=F64)), "out must be like q"),
        (result(out=torch.zeros(2, 4, 8, 5).mT), "out must be like q"),
        (result(torch.zeros(2, 4, 6)), r"lse must be contiguous f32\[2, 4, 5\]"),
        (result(torch.zeros(2, 4, 5, dtype=F64)), r"lse must be contiguous f32\[2, 4, 5\]"),
        (result(torch.zeros(2, 5, 4).mT), r"lse must be contiguous f32\[2, 4, 5\]"),
        ({"bias": torch.zeros(4, 5, 70)}, BIAS),
        ({"bias": torch.zeros(3, 4, 5, 70)}, BIAS),
        ({"bias": torch.zeros(2, 2, 5, 70)}, BIAS),
        ({"bias": torch.zeros(2, 4, 4, 70)}, BIAS),
        ({"bias": torch.zeros(2, 4, 5, 1)}, BIAS),
        ({"bias": torch.zeros(2, 4, 70, 5).mT}, BIAS),
        ({"bias": torch.zeros(2, 4, 5, 70, dtype=BF16)}, "bias must be f32 or of the dtype of q"),
        ({"bias": torch.zeros(2, 4, 5, 70, dtype=F64)}, "bias must be f32 or of the dtype of q"),
        ({"factor": torch.zeros(4, 75)}, FACTOR),
        ({"factor": torch.zeros(2, 74)}, FACTOR),
        ({"factor": torch.zeros(74)}, FACTOR),
        ({"factor": torch.zeros(4, 74, dtype=F16)}, FACTOR),
        ({"factor": torch.zeros(4, 148)[:, ::2]}, FACTOR),
        ({"key_lengths": starts(70)}, r"key_lengths must be i32\[2\], got"),
        ({"key_lengths": starts(70, 70, dtype=torch.int64)}, r"key_lengths must be i32\[2\]"),
        ({"key_lengths": starts(70, 71)}, r"key_lengths must be 0\.\.70, got 71"),
        ({"key_lengths": starts(-1, 70)}, r"key_lengths must be 0\.\.70, got -1"),
        ({"block_mask": torch.ones(2, 4, 1, 2)}, BLOCKS),
        ({"block_mask": torch.ones(2, 4, 2, 2, dtype=torch.uint8)}, BLOCKS),
        ({"block_mask": torch.ones(2, 4, 1, 1, dtype=torch.uint8)}, BLOCKS),
        ({"block_mask": torch.ones(2, 2, 1, 2, dtype=torch.uint8)}, BLOCKS),
        ({"block_mask": torch.ones(3, 1, 1, 2, dtype=torch.uint8)}, BLOCKS),
        ({"block_mask": torch.ones(1, 2, dtype=torch.uint8)}, BLOCKS),
        ({"block_mask": torch.ones(1, 1, 1, 4, dtype=torch.uint8)[..., ::2]}, BLOCKS),
        ({"head_shift": starts(1, 1, 1, 1)}, r"head_shift must be i32\[2\]"),
        ({"head_shift": starts(1, 1, dtype=torch.int64)}, r"head_shift must be i32\[2\]"),
        ({"frames": 0}, "frames must divide the batch 2, got 0"),
        ({"frames": 3}, "frames must divide the batch 2, got 3"),
        ({"q_starts": starts(0, 5)}, "cu_seqlens of queries and keys must be given together"),
        ({"k_starts": starts(0, 70)}, "cu_seqlens of queries and keys must be given together"),
        ({**PACKED, "q_starts": starts(0)}, r"cu_seqlens must be i32\[sequences \+ 1\]"),
        ({**PACKED, "k_starts": starts(0, 10, 20, 70)}, r"cu_seqlens must be i32\[sequences \+ 1\]"),
        ({**PACKED, "q_starts": starts(0, 2, 5).long()}, r"cu_seqlens must be i32\[sequences \+ 1\]"),
        ({**PACKED, "k_starts": starts([0, 30, 70])}, r"cu_seqlens must be i32\[sequences \+ 1\]"),
        ({**PACKED, "q": Q, "k": K}, ALONE),
        ({**PACKED, "bias": torch.zeros(1, 1, 1, 70)}, ALONE),
        ({**PACKED, "factor": torch.zeros(1, 74)}, ALONE),
        ({**PACKED, "key_lengths": starts(70)}, ALONE),
        ({**PACKED, "block_mask": torch.ones(1, 1, 1, 2, dtype=torch.uint8)}, ALONE),
        ({**PACKED, "head_shift": starts(0, 0)}, ALONE),
        (
            {**PACKED, "q_starts": starts(1, 2, 5)},
            r"cu_seqlens must go from 0 to the number of tokens 5, got 1 \.\. 5",
        ),
        ({**PACKED, "q_starts": starts(0, 2, 4)}, r"must go from 0 to the number of tokens 5, got 0 \.\. 4"),
        (
            {**PACKED, "k_starts": starts(0, 2, 5)},
            "cu_seqlens of the keys must go from 0 to the number of tokens 70",
        ),
        ({**PACKED, "q_starts": starts(0, 6, 5)}, "cu_seqlens must not decrease, got 6 before 5"),
        (
            {**PACKED, "k_starts": starts(0, -1, 70)},
            "cu_seqlens of the keys must not decrease, got 0 before -1",
        ),
        ({"precision": "int4"}, "precision must be full, int8, fp8 or auto, got int4"),
        (
            {"precision": "int8", "q": Q.double(), "k": K.double()},
            "precision must be full for float64 tensors",
        ),
        (
            {"key_mean": torch.zeros(2, 4, 8), "precision": "int8"},
            r"key_mean must be contiguous f32\[2, 2, 8\]",
        ),
        ({"key_mean": torch.zeros(2, 2, 8, dtype=BF16)}, r"key_mean must be contiguous f32\[2, 2, 8\]"),
        ({"key_mean": torch.zeros(2, 8, 2).mT}, r"key_mean must be contiguous f32\[2, 2, 8\]"),
        ({**PACKED, "key_mean": torch.zeros(1, 2, 8)}, r"key_mean must be contiguous f32\[2, 2, 8\]"),
    ],
)
def test_attention_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


def test_attention_refuses_results_over_its_inputs():
    memory = torch.zeros(1000)
    q = memory[:320].view(2, 4, 5, 8)
    lse = torch.zeros(2, 4, 5)
    for out in (q, memory[100:420].view(2, 4, 5, 8)):
        with pytest.raises(ValueError, match="share no memory"):
            call(q=q, out=(out, lse))
    with pytest.raises(ValueError, match="share no memory"):
        call(out=(q, memory[300:340].view(2, 4, 5)))
    k = memory[:320].view(2, 2, 10, 8)
    for named in ({"k": k}, {"v": k, "k": k.clone()}, {"bias": memory[:70].view(1, 1, 1, 70)}):
        with pytest.raises(ValueError, match="share no memory"):
            call(**named, out=(q, lse))


def test_attention_refuses_a_workspace_or_a_decision_that_does_not_fit(monkeypatch):
    from rfkernels import _C

    lse, out, none = torch.zeros(2, 4, 5), torch.zeros_like(Q), [None] * 8

    def run(fell_back, workspace, precision):
        _C.attention(out, lse, Q, K, K, *none, fell_back, workspace, 0.5, 1, precision)

    size = _C.attention_workspace(Q, K, None, "int8")
    enough = torch.zeros(max(size, _C.attention_workspace(Q, K, None, "auto")), dtype=torch.uint8)
    decision = torch.zeros(2, 4, dtype=torch.uint8)
    assert size > 0
    for workspace in (None, enough[: size - 1], enough[:size].view(torch.int8), enough.repeat(2)[::2]):
        with pytest.raises(ValueError, match=rf"workspace must be contiguous u8\[{size}\]"):
            run(None, workspace, "int8")
    for fell_back in (None, decision[:, :2], decision.char(), decision.int(), decision[:1], decision.mT):
        with pytest.raises(ValueError, match=r"fell_back must be given for auto alone, u8\[2, 4\]"):
            run(fell_back, enough, "auto")
    for precision in ("full", "int8", "fp8"):
        with pytest.raises(ValueError, match="fell_back must be given for auto alone"):
            run(decision, enough, precision)
    run(decision, enough, "auto")


TOKENS_LAST = torch.zeros(5, 4, 8)


@pytest.mark.parametrize(
    "f, message",
    [
        (
            lambda: ops.attention(Q, K, K, precision="int4"),
            "precision must be one of full, bf16, int8, fp8, auto",
        ),
        (lambda: ops.attention(Q, K, K, layout="lbhd"), "layout must be 'bhld' or 'blhd', got 'lbhd'"),
        (lambda: ops.key_mean(K, layout="lbhd"), "layout must be 'bhld' or 'blhd'"),
        (lambda: ops.attention(Q[0], K, K), r"q must be four axes, bhld, got \(4, 5, 8\)"),
        (lambda: ops.attention(Q, K[0], K, layout="blhd"), r"k must be four axes, blhd, got \(2, 70, 8\)"),
        (lambda: ops.attention(Q, K, K[0, 0]), r"v must be four axes, bhld, got \(70, 8\)"),
        (
            lambda: ops.attention(Q, TOKENS_LAST, TOKENS_LAST, cu_seqlens=starts(0, 5)),
            r"q must be \[tokens, heads, d\] beside cu_seqlens, got \(2, 4, 5, 8\)",
        ),
        (
            lambda: ops.attention(*[TOKENS_LAST] * 3, cu_seqlens=starts(0, 4)),
            "must go from 0 to the number of tokens 5",
        ),
        (
            lambda: ops.attention(*[TOKENS_LAST] * 3, cu_seqlens=starts(0, 5), bias=torch.zeros(1, 1, 1, 5)),
            "cu_seqlens goes with a batch of 1 and without bias",
        ),
        (lambda: ops.attention(Q, Q, K, layout="blhd"), "k and v must be"),
        (
            lambda: ops.attention(Q, K, K, bias=torch.ones(5, 70).bool()),
            r"bias must be \[2 or 1, 4 or 1, 5 or 1, 70\]",
        ),
        (
            lambda: ops.attention(Q, K, K, key_lengths=torch.tensor([70, 71])),
            r"key_lengths must be 0\.\.70, got 71",
        ),
        (
            lambda: ops.attention(Q.double(), K.double(), K.double(), precision="auto"),
            "full for float64 tensors",
        ),
    ],
)
def test_function_refuses_what_does_not_fit(f, message):
    with pytest.raises(ValueError, match=message):
        f()


def test_results_given_have_no_gradient():
    q = Q.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="out= has no gradient"):
        call(q=q, **result())
