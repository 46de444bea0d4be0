"""What the rope room refuses, and in which words."""

import pytest
import torch

from rfkernels import ops
from tests.ops.cases import F32, F64
from tests.ops.rope_calls import Make, run

HEADS, KV_HEADS, D = 4, 2, 24
WIDTH = (HEADS + 2 * KV_HEADS) * D


def options_of(d=D, **changed):
    make = Make(F32)
    return {"kv_heads": KV_HEADS, "q_weight": make.weight(d), "k_weight": make.weight(d)} | changed


QKV, TABLE = torch.zeros(2, 5, WIDTH), torch.zeros(5, D // 2, 2)
NO_NORM = {"q_weight": None, "k_weight": None}
Q, K = torch.zeros(2, 5, HEADS * D), torch.zeros(2, 5, KV_HEADS * D)
REFUSALS = {
    "width": (QKV[..., 1:], {}, r"the width of qkv must be a multiple of its 8 heads, got f32\[2, 5, 191\]"),
    "odd d": (torch.zeros(2, 5, 8 * 3), {}, r"the head dim must be even, 2\.\.256, got 3 of f32\[2, 5, 24\]"),
    "large d": (torch.zeros(2, 5, 8 * 258), {}, r"the head dim must be even, 2\.\.256, got 258"),
    "no width": (torch.zeros(2, 5, 0), {}, "the head dim must be even, .* got 0"),
    "no batch": (QKV[0], {}, r"qkv must be \[batch, tokens, width\], got \[5, 192\]"),
    "4 axes": (QKV.view(2, 5, 8, D), {}, r"qkv must be \[batch, tokens, width\], got f32\[2, 5, 8, 24\]"),
    "heads": (QKV, {"kv_heads": 3}, "heads must be a multiple of kv_heads, both positive, got 4 and 3"),
    "no heads": (QKV, {"kv_heads": 0}, "heads and kv_heads must be positive, got 4 and 0"),
    "gaps": (torch.zeros(2, 5, 2 * WIDTH)[..., ::2], {}, "qkv must have no gaps.*stride 2"),
    "integers": (QKV.int(), NO_NORM, "expected a floating dtype, got i32"),
    "pair": ((Q, K), {}, r"expected streams of one tensor or of \(q, k, v\), got 2"),
    "k": ((Q, Q, K), {}, r"k of stream 0 must be \[2, 5, 2 \* 24\], got f32\[2, 5, 96\]"),
    "v": ((Q, K, K[:, 1:]), {}, r"v of stream 0 must be \[2, 5, 2 \* 24\], got f32\[2, 4, 48\]"),
    "batches": ([QKV, QKV[:1]], {}, r"qkv of stream 1 must be \[2, 5, 8 \* 24\], got f32\[1, 5, 192\]"),
    "dtypes": ([QKV, QKV.double()], {}, "expected one dtype and device, got f32.* and f64"),
    "v dtype": ((Q, K, K.bfloat16()), {}, "expected one dtype and device, got f32.* and bf16"),
    "weight": (QKV, {"k_weight": torch.ones(D + 1)}, r"k_weight must be \[24\] .* got f32\[25\]"),
    "weight dtype": (QKV, {"q_weight": torch.ones(D, dtype=F64)}, "q_weight must have the dtype of f32"),
    "weight f32": (QKV.double(), {}, "or be f32 beside 16-bit tokens, got f32"),
    "weights": (QKV.half(), {"q_weight": torch.ones(D).half()}, "weights of one dtype, got f16.* and f32"),
    "weight gaps": (QKV, {"q_weight": torch.ones(2 * D)[::2]}, "q_weight must have no gaps"),
    "weight list": ([QKV, QKV], {"q_weight": [None]}, "must be one or as many as the 2 streams, got 1"),
    "table dtype": (QKV, {"rotation": TABLE.double()}, "rotation must be f32 on the device of .* got f64"),
    "table f64": (QKV.double(), NO_NORM | {"rotation": TABLE}, "rotation must be f64"),
    "table d": (QKV, {"rotation": TABLE[:, 1:]}, r"must be \[rows, 12, 2\] or .* got f32\[5, 11, 2\]"),
    "table cos": (QKV, {"rotation": TABLE[..., 0]}, r"rotation must be \[rows, 12, 2\]"),
    "table batch": (QKV, {"rotation": TABLE.expand(3, 5, D // 2, 2)}, r"or \[2, rows, 12, 2\], got f32\[3, "),
    "table gaps": (QKV, {"rotation": TABLE.mT.contiguous().mT}, "rotation must have no gaps"),
    "rows": (QKV, {"rotation": TABLE, "rotate_from": 1}, r"rows at most the 5 tokens, got 1 \+ 5"),
    "before": (QKV, {"rotation": TABLE, "rotate_from": -1}, r"rotate_from must be 0 or more .* got -1 \+ 5"),
    "layout": (QKV, {"layout": "bldh"}, "layout must be bhld or blhd, got bldh"),
    "tier": (QKV, {"tier": "slow"}, "tier must be fast, exact or exact_before_weight, got slow"),
}


@pytest.mark.parametrize("kernel", ["cpu", "emulated"])
@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_what_does_not_fit(name, kernel):
    qkv, changed, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        run(kernel, qkv, HEADS, **options_of(**changed))


def test_refuses_a_wrong_out():
    q, k, v = ops.qkv_norm_rope(QKV, HEADS, **options_of())
    memory = torch.zeros(2 * 4 * 5 * D + QKV.numel())
    across = memory[: q.numel()].view(q.shape)
    for qkv, out, message in [
        (QKV, (q.double(), k, v), r"out q must be f32\[2, 5, 4, 24\] on the device of .* got f64"),
        (QKV, (q, q, v), r"out k must be f32\[2, 5, 2, 24\]"),
        (QKV, (q, k, v.transpose(1, 2)), r"out v must be f32\[2, 5, 2, 24\]"),
        (QKV, (q, k, v.mT.contiguous().mT), "out v must have no gaps along its last axis"),
        (QKV, (q, k, k), "q, k and v of out must be different memory"),
        (QKV, (q[:1].expand(2, 5, 4, D), k, v), "out must have no overlap within, got .* with stride 0"),
        (memory[-1 - QKV.numel() : -1].view(QKV.shape), (across, k, v), "out must share no memory"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.qkv_norm_rope(qkv, HEADS, out=out, **options_of())


def test_refuses_a_gradient_through_out():
    out = ops.qkv_norm_rope(QKV, HEADS, kv_heads=KV_HEADS)
    with pytest.raises(RuntimeError, match="out= has no gradient"):
        ops.qkv_norm_rope(QKV.clone().requires_grad_(), HEADS, kv_heads=KV_HEADS, out=out)


def test_backward_refuses_what_does_not_fit():
    grad, weights = torch.zeros(2, HEADS, 9, D), [torch.ones(D)] * 2
    args = [grad, None, None, [QKV], weights, None, 1, HEADS, KV_HEADS, 4, 0, 1e-6, "bhld"]
    for at, wrong, message in [
        (0, grad.double(), r"dq must be f32\[2, 4, 9, 24\] on the device of .* got f64"),
        (1, grad, r"dk must be f32\[2, 2, 9, 24\]"),
        (3, [QKV, QKV], "expected no weights or two per stream, got 2 for 2"),
        (9, 5, r"start must be 0 or more and start \+ 5 tokens at most 9, got 5"),
        (9, -1, "start must be 0 or more .* got -1"),
        (12, "bldh", "layout must be bhld or blhd"),
    ]:
        with pytest.raises(ValueError, match=message):
            torch.ops.rfkernels.qkv_norm_rope_backward(*args[:at], wrong, *args[at + 1 :])
