"""The calls that `bench.same_bits` compares on two devices: CPU kernels and emulated ones here."""

import pytest
import torch

from bench import same_regions
from bench.same_bits import as_tuple
from rfkernels import ops
from rfkernels.ops import embedding
from rfkernels.ops._register import Op

CALLS = list(same_regions.calls())


def run_emulated(emulated, op: Op, args: tuple) -> tuple[torch.Tensor, ...]:
    results = as_tuple(op.empty(*args))
    outs, left = results, args
    if op.name.endswith("_quantize"):
        *tokens, codes, scales = results
        codes = codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes
        outs, left = (
            (*tokens, codes, scales),
            (*args[:-3], *args[-2:]),
        )  # the dtype of the codes says the format
    if op.name == "timestep_embedding":
        t, dim, scale, max_period, shift, flip, _ = args
        left = t, embedding._frequencies(dim // 2, max_period, shift, t.device), scale, flip
    getattr(emulated, op.name)(*outs, *left)
    return results


@pytest.mark.parametrize("name", sorted({op.name for _, op, _, _ in CALLS}))
def test_kernels_agree_as_the_devices_must(emulated, name):
    for what, op, args, tolerance in CALLS:
        if op.name == name:
            here, there = as_tuple(op(*args)), run_emulated(emulated, op, args)
            assert same_regions.differing(here, there, tolerance) == 0, what


def test_every_region_is_called():
    others = {"affine_step", "cfg_step", "linear_combination", "taylor_step", "philox_normal", "renoise"}
    others |= {"combine", "moments", "stochastic_step"}  # in tests/ops/test_combine.py
    others.add("attention_merge")  # to the bit, in tests/ops/test_attention_merge.py
    others.add("stochastic_round")  # to the bit, in bench/same_bits.py and test_emulated.py
    others.add("linear")  # compared with its definition, in bench/smoke_linear.py and test_linear.py
    others |= {"dequantize_gguf", "linear_gguf"}  # to the bit, and the same: test_linear_gguf.py
    others |= {"moe_route", "moe_combine"}  # to the bit, in tests/ops/test_moe.py
    others.add("grouped_linear")  # compared with its definition, in tests/ops/test_grouped_linear.py
    others.add("attention")  # the same: bench/smoke_attention.py and test_attention.py
    assert {op.name for _, op, _, _ in CALLS} == set(ops.OPS) - others


def test_a_bit_counts_where_none_may_differ():
    x = torch.ones(3, 4)
    other = x.clone()
    other[0, 0] = 1.0000001
    assert same_regions.differing((x,), (other,), 0.0) == 1
    assert same_regions.differing((x,), (other,), 1e-6) == 0
    assert same_regions.differing((x,), (torch.full_like(x, torch.nan),), 1e-6) == 12
