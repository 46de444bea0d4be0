import pytest
import torch
import torch.nn.functional as F

from rfkernels.adapters.base import run
from rfkernels.adapters.timestep import (
    Switch,
    TimestepLoRA,
    interval_coefficients,
    multiscale_coefficients,
    rank_mask,
)
from tests.adapters.layers import Running, check_factors, check_round_trip, close, layer, randn

OUT, IN, RANK, EXPERTS = 10, 12, 3, 4
BOUNDS = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
TIMES = [0.0, 0.1, 0.2, 0.49, 0.5, 0.89, 0.9, 0.95, 1.0]
INTERVAL = [0, 0, 1, 1, 2, 2, 3, 3, 3]


def stack(shared=False):
    rows = RANK if shared else EXPERTS * RANK
    return {"lora_A.weight": randn(rows, IN), "lora_B.weight": randn(OUT, EXPERTS * RANK)}


def bounded(shared=False):
    return stack(shared) | {"lora_t_bounds": BOUNDS}


def routed(shared=False):
    return stack(shared) | {
        "lora_t_router.0.weight": randn(6, 5),
        "lora_t_router.0.bias": randn(6),
        "lora_t_router.2.weight": randn(EXPERTS, 6),
        "lora_t_router.2.bias": randn(EXPERTS),
    }


def definition(made, x, shares, scale, mask=None):
    a = made["lora_A.weight"]
    pieces = a.chunk(EXPERTS) if len(a) > RANK else [a] * EXPERTS
    mask = torch.ones(RANK, dtype=torch.float64) if mask is None else mask
    delta = sum(
        c * b @ torch.diag(mask) @ a
        for c, a, b in zip(shares, pieces, made["lora_B.weight"].chunk(EXPERTS, 1), strict=True)
    )
    return scale * x @ delta.T


@pytest.mark.parametrize("t, j", list(zip(TIMES, INTERVAL, strict=True)))
def test_intervals_are_closed_on_the_left_and_the_last_on_both_sides(t, j):
    assert interval_coefficients(t, BOUNDS).argmax() == j
    assert interval_coefficients(t, BOUNDS).sum() == 1


def test_intervals_of_a_batch():
    rows = interval_coefficients(torch.tensor(TIMES, dtype=torch.float64), BOUNDS)
    assert rows.argmax(-1).tolist() == INTERVAL
    outside = interval_coefficients(torch.tensor([-1.0, 2.0]), BOUNDS)
    assert outside.argmax(-1).tolist() == [0, 3]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("t, j", list(zip(TIMES, INTERVAL, strict=True)))
def test_three_ways_are_one(t, j, shared):
    base, x, made = layer(OUT, IN), randn(2, 7, IN), bounded(shared)
    adapter = TimestepLoRA(made, alpha=6.0)
    expected = base(x) + definition(made, x, torch.eye(EXPERTS, dtype=torch.float64)[j], 2.0)
    weight, bias = adapter.merged_at(base.weight, base.bias, t)
    close(F.linear(x, weight, bias), expected)
    adapter.set_time(t)
    for kind in (base, Running(base)):
        close(run(kind, x, adapter.branch(x)), expected)
    close(adapter(x, base), expected)
    close(adapter.merged(base.weight)[0], weight)
    check_factors(adapter, base, x)
    switched = layer(OUT, IN)
    switch = Switch(switched, adapter)
    switch.set_time(t)
    close(switched(x), expected)


def test_a_switch_merges_on_change_and_restores_the_bits():
    switched, adapter = layer(OUT, IN, dtype=torch.bfloat16), TimestepLoRA(bounded())
    before = switched.weight.clone()
    switch = Switch(switched, adapter)
    for t in (1.0, 0.95, 0.9, 0.6, 0.55, 0.1, 0.0):
        switch.set_time(t)
        merged, _ = adapter.merged_at(before, None, t)
        assert torch.equal(switched.weight, merged.to(torch.bfloat16))
    assert switch.merges == 3
    switch.restore()
    assert torch.equal(switched.weight, before)
    switch.set_time(0.0)
    assert switch.merges == 4 and not torch.equal(switched.weight, before)


def test_one_expert_is_a_lora():
    base, x = layer(OUT, IN), randn(7, IN)
    made = {"lora_A.weight": randn(RANK, IN), "lora_B.weight": randn(OUT, RANK)}
    adapter = TimestepLoRA(made | {"lora_t_bounds": torch.tensor([0.0, 1.0])}, alpha=6.0)
    adapter.set_time(0.3)
    a, b = made.values()
    close(adapter(x, base), base(x) + 2 * x @ a.T @ b.T)


@pytest.mark.parametrize("shared", [False, True])
def test_router_mixes_by_softmax(shared):
    base, x, made, temb = layer(OUT, IN), randn(7, IN), routed(shared), randn(5, seed=4)
    adapter = TimestepLoRA(made, alpha=6.0)
    w0, b0, w2, b2 = list(made.values())[2:]
    shares = (w2 @ F.silu(w0 @ temb + b0) + b2).softmax(0)
    adapter.set_time(0.3, temb)
    close(adapter(x, base), base(x) + definition(made, x, shares, 2.0))
    close(F.linear(x, *adapter.merged_at(base.weight, base.bias, 0.3, temb)), adapter(x, base))


def test_times_of_a_batch_are_the_loop():
    base, x, made = layer(OUT, IN), randn(5, 7, IN), bounded()
    adapter = TimestepLoRA(made, alpha=6.0, least_rank=1)
    times = torch.tensor([0.0, 0.95, 0.3, 0.6, 1.0], dtype=torch.float64)
    expected = []
    for s, t in zip(x, times.tolist(), strict=True):
        adapter.set_time(t)
        expected.append(adapter(s, base))
    adapter.set_time(times)
    close(adapter(x, base), torch.stack(expected))
    assert adapter.factors(base.weight) is None
    with pytest.raises(ValueError, match="one time for the batch required"):
        adapter.merged(base.weight)


def test_the_vector_of_a_step_changes_in_place():
    adapter = TimestepLoRA(bounded())
    place = adapter.columns.data_ptr()
    for t in TIMES:
        adapter.set_time(t)
        assert adapter.columns.data_ptr() == place
    adapter.set_time(torch.tensor([0.1, 0.9]))
    place = adapter.columns.data_ptr()
    adapter.set_time(torch.tensor([0.3, 0.2]))
    assert adapter.columns.data_ptr() == place and adapter.columns.shape == (2, 1, EXPERTS * RANK)


@pytest.mark.parametrize("shared", [False, True])
def test_rows_switch_off_the_unconditional_half(shared):
    base, x, adapter = layer(OUT, IN), randn(4, 7, IN), TimestepLoRA(bounded(shared))
    adapter.set_time(0.3)
    y = run(base, x, adapter.branch(x, rows=torch.tensor([1.0, 1.0, 0.0, 0.0])))
    close(y[:2], adapter(x[:2], base))
    close(y[2:], base(x[2:]))


def test_rank_mask_shrinks_with_the_noise():
    assert [int(rank_mask(t, 8, 2).sum()) for t in (0.0, 0.5, 1.0)] == [8, 5, 2]
    assert rank_mask(torch.tensor([0.0, 1.0]), 4, 1).tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    base, x, made = layer(OUT, IN), randn(7, IN), bounded()
    adapter = TimestepLoRA(made, alpha=6.0, least_rank=1)
    adapter.set_time(0.6)
    shares, mask = interval_coefficients(0.6, BOUNDS), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    close(adapter(x, base), base(x) + definition(made, x, shares, 2.0, mask))


def test_scales_of_tsm():
    fine, coarse = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.0, 0.25, 1.0])
    assert multiscale_coefficients(0.3, [fine, coarse]).tolist() == [1, 0, 0, 1]
    gated = multiscale_coefficients(0.3, [fine, coarse], torch.tensor([0.25]))
    assert gated.tolist() == [1, 0, 0, 0.25]
    batch = multiscale_coefficients(torch.tensor([0.1, 0.7]), [fine, coarse], torch.tensor([[0.5], [0.25]]))
    assert batch.tolist() == [[1, 0, 0.5, 0], [0, 1, 0, 0.25]]
    base, x, made = layer(OUT, IN), randn(7, IN), stack()
    adapter = TimestepLoRA(made, experts=EXPERTS)
    adapter.set_time(0.3, shares=gated)
    close(adapter(x, base), base(x) + definition(made, x, gated.double(), 1.0))


@pytest.mark.parametrize("shared", [False, True])
def test_round_trips(shared):
    check_round_trip(TimestepLoRA, bounded(shared))
    check_round_trip(TimestepLoRA, routed(shared))
    check_round_trip(TimestepLoRA, stack(shared), experts=EXPERTS)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: interval_coefficients(1.5, BOUNDS), r"t must lie in \[0.0, 1.0\], got 1.5"),
        (lambda: TimestepLoRA(bounded() | routed()), "bounds or a router, got both"),
        (
            lambda: TimestepLoRA(stack() | {"lora_t_bounds": torch.tensor([0.0, 1.0, 0.5])}),
            "bounds must ascend",
        ),
        (lambda: TimestepLoRA(stack(), experts=5), r"J = 5 required, got \[12, 12\], \[10, 12\]"),
        (lambda: TimestepLoRA(stack()), "J = None required"),
        (
            lambda: TimestepLoRA({k: v for k, v in routed().items() if k != "lora_t_router.0.bias"}),
            r"missing: lora_t_router.0.bias",
        ),
        (
            lambda: TimestepLoRA(stack(), experts=4).set_time(0.5),
            "neither bounds nor router: shares required",
        ),
        (lambda: TimestepLoRA(routed()).set_time(0.5), r"needs the embedding of t, \[.., 5\]"),
        (
            lambda: TimestepLoRA(bounded()).set_time(0.5, shares=torch.ones(3)),
            r"shares must be \[.., 4\], got \[3\]",
        ),
        (lambda: TimestepLoRA(bounded()).merged(randn(OUT, 11)), r"for a weight \[10, 12\], got \[10, 11\]"),
        (lambda: rank_mask(0.5, 4, 5), r"least must be 0 .. 4, got 5"),
        (lambda: multiscale_coefficients(0.5, [BOUNDS], torch.ones(1)), r"gate must be \[.., 0\], got \[1\]"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
