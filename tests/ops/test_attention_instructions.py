"""Attention on the CPU with every set of instructions."""

import pytest
import torch

from rfkernels import _C
from tests.ops.attention_cases import FLOATS, HEAD_DIMS, assert_matches, chooser, random_call, simple
from tests.ops.cases import BF16, F32, F64
from tests.ops.test_linear import INSTRUCTIONS

EIGHT_BITS = ("int8", "fp8")


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request):
    there = _C.limit_instructions(request.param)
    yield request.param
    _C.limit_instructions(INSTRUCTIONS[-1])
    assert there or request.param != "generic"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_random_calls(dtype, instructions):
    for seed in range(100, 115):
        assert_matches(random_call(chooser(seed), dtype))


@pytest.mark.parametrize("precision", EIGHT_BITS)
def test_random_calls_in_eight_bits(precision, instructions):
    for seed in range(200, 215):
        dtype = FLOATS[1 + seed % 3]
        assert_matches(random_call(chooser(seed), dtype, tame=True), precision)


def test_every_head_dim_and_tile(instructions):
    for d in HEAD_DIMS[1::2]:
        for rows, keys in ((13, 33), (1, 256), (25, 257)):
            for dtype in (F64, F32, BF16):
                assert_matches(simple((1, 2, 1, rows, keys, d), dtype, "cpu"))
            for precision in EIGHT_BITS:
                assert_matches(simple((1, 2, 1, rows, keys, d), BF16, "cpu"), precision)


def test_nothing_seen_and_nothing_finite(instructions):
    call = simple((2, 2, 1, 30, 300, 64), BF16, "cpu")
    lengths = torch.tensor([300, 0])
    k = call.k.clone()
    k[1] = torch.nan
    for precision in ("full", *EIGHT_BITS, "auto"):
        out, lse = call.but(k=k, key_lengths=lengths).run(precision)
        assert (out[1] == 0).all() and (lse[1] == -torch.inf).all() and out[0].isfinite().all()
        out, lse = call.but(k=k).run(precision)
        assert out[1].isnan().all() and lse[1].isnan().all() and out[0].isfinite().all()


def test_auto_decides_alike(instructions):
    from rfkernels.ops._attention import fallbacks

    call = simple((1, 3, 3, 40, 100, 64), BF16, "cpu")
    q, k = call.q.clone(), call.k.clone()
    q[0, 1, :, 9] *= 30
    k[0, 1, :, 9] *= 30
    out, _ = call.but(q=q, k=k).run("auto")
    assert fallbacks[-1].tolist() == [[0, 1, 0]]
    assert torch.equal(out[0, 1], call.but(q=q, k=k).run()[0][0, 1])
