import pytest
import torch

from rfkernels.adapters.base import Factors, run
from rfkernels.adapters.lora import LoRA, concatenate, pissa_to_lora, truncate
from tests.adapters.layers import (
    Running,
    check_factors,
    check_merge,
    check_round_trip,
    close,
    layer,
    randn,
)

OUT, IN, RANK = 10, 12, 3


def tensors(rank=RANK, seed=0, names=("lora_A.weight", "lora_B.weight")):
    return {names[0]: randn(rank, IN, seed=seed), names[1]: randn(OUT, rank, seed=seed + 1)}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "alpha, rslora, scale", [(None, False, 1.0), (6.0, False, 2.0), (6.0, True, 6 / 3**0.5)]
)
def test_lora_is_its_formula_merged_and_as_factors(alpha, rslora, scale, bias):
    base, x = layer(OUT, IN, bias), randn(2, 7, IN)
    made = tensors()
    adapter = LoRA(made, alpha=alpha, rslora=rslora)
    a, b = made.values()
    close(adapter(x, base), base(x) + scale * (x @ a.T) @ b.T)
    check_merge(adapter, base, x)
    check_factors(adapter, base, x)


def test_lora_bias_is_scaled_as_the_branch_is():
    base, x = layer(OUT, IN, bias=False), randn(7, IN)
    made = {**tensors(), "lora_B.bias": randn(OUT)}
    adapter = LoRA(made, alpha=6.0)
    a, b, c = made.values()
    close(adapter(x, base), base(x) + 2 * ((x @ a.T) @ b.T + c))
    check_merge(adapter, base, x)
    check_factors(adapter, base, x)


@pytest.mark.parametrize(
    "names",
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_down.weight", "lora_up.weight"),
        ("lora.down.weight", "lora.up.weight"),
    ],
)
def test_lora_reads_and_writes_the_names_of_files(names):
    made = {**tensors(names=names), "alpha": torch.tensor(6.0)}
    check_round_trip(LoRA, made)
    assert LoRA.from_state_dict(made).scale == 2.0


def test_lora_of_a_convolution_merges():
    down, up = randn(RANK, IN, 3, 3), randn(OUT, RANK, 1, 1)
    weight, x = randn(OUT, IN, 3, 3), randn(2, IN, 8, 8)
    merged, _ = LoRA({"lora_down.weight": down, "lora_up.weight": up}, alpha=6.0).merged(weight)
    conv = torch.nn.functional.conv2d
    close(conv(x, merged), conv(x, weight) + 2 * conv(conv(x, down), up))


def test_lora_of_a_convolution_in_tucker_form_merges():
    down, mid, up = randn(RANK, IN, 1, 1), randn(RANK, RANK, 3, 3), randn(OUT, RANK, 1, 1)
    weight, x = randn(OUT, IN, 3, 3), randn(2, IN, 8, 8)
    made = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    merged, _ = LoRA(made).merged(weight)
    conv = torch.nn.functional.conv2d
    close(conv(x, merged), conv(x, weight) + conv(conv(conv(x, down), mid), up))
    assert LoRA(made).factors() is None
    check_round_trip(LoRA, made)


def test_lora_trains_in_plain_torch():
    base, x = layer(OUT, IN), randn(7, IN)
    adapter = LoRA(tensors(), alpha=6.0).requires_grad_()
    adapter(x, base).square().sum().backward()
    delta = adapter.delta_weight(torch.float64)
    grad = torch.autograd.grad((base(x) + x @ delta.T).square().sum(), list(adapter.parameters()))
    for p, g in zip(adapter.parameters(), grad, strict=True):
        close(p.grad, g)


@pytest.mark.parametrize("kind", [Running, lambda base: base, lambda base: base.forward])
def test_run_fuses_a_branch_into_any_layer(kind):
    base, x = layer(OUT, IN), randn(2, 7, IN)
    hidden, up, extra = randn(2, 7, 4), randn(OUT, 4), randn(OUT, seed=5)
    close(run(kind(base), x, (hidden, up, extra)), base(x) + hidden @ up.T + extra)
    if kind is Running:
        close(run(kind(base), x, (hidden, up, None), activation="relu"), (base(x) + hidden @ up.T).relu())


def test_run_refuses_an_epilogue_without_a_linear_layer():
    with pytest.raises(ValueError, match="an epilogue needs a linear layer, got Sequential"):
        run(
            torch.nn.Sequential(layer(OUT, IN)),
            randn(7, IN),
            (randn(7, 4), randn(OUT, 4), None),
            activation="relu",
        )


def test_concatenation_is_the_weighted_sum():
    one, two = LoRA(tensors(2), alpha=3.0), LoRA(tensors(4, seed=5), alpha=8.0)
    form = concatenate([one.factors(), two.factors()], [0.5, -2.0])
    expected = 0.5 * one.delta_weight(torch.float64) - 2 * two.delta_weight(torch.float64)
    assert form.down.shape == (6, IN)
    close(form.scale * form.up @ form.down, expected)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_truncation_is_that_of_the_dense_svd(rank):
    both = concatenate([LoRA(tensors(2)).factors(), LoRA(tensors(4, seed=5)).factors()])
    dense = both.up @ both.down
    u, s, vt = torch.linalg.svd(dense)
    form, error = truncate(both, rank)
    close(form.up @ form.down, (u[:, :rank] * s[:rank]) @ vt[:rank])
    tail = (s[rank:].square().sum() / s.square().sum()).sqrt()
    assert abs(error - float(tail)) < 1e-11


def test_truncation_of_more_columns_than_outputs():
    many = Factors(randn(30, IN), randn(OUT, 30), 0.5)
    form, error = truncate(many, 20)
    close(form.up @ form.down, 0.5 * many.up @ many.down)
    assert error < 1e-7


@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_converts_to_a_lora_of_twice_the_rank(rslora):
    original, x = layer(OUT, IN), randn(7, IN)
    initial = LoRA(tensors(seed=7), alpha=6.0, rslora=rslora)
    trained = LoRA(tensors(seed=9), alpha=6.0, rslora=rslora)
    mutated = layer(OUT, IN)
    mutated.weight.sub_(initial.delta_weight(torch.float64))
    converted = pissa_to_lora(trained, initial)
    assert converted.down.shape[0] == 2 * RANK
    close(converted(x, original), trained(x, mutated))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lora_B.weight": None}, "missing: lora_B.weight"),
        ({"lora_C.weight": randn(2, 2)}, "unknown: lora_C.weight"),
        ({"lora_B.weight": randn(OUT, 4)}, r"must share r, got \[3, 12\] and \[10, 4\]"),
    ],
)
def test_lora_refuses_bad_tensors(change, message):
    made = {k: v for k, v in {**tensors(), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        LoRA.from_state_dict(made)


def test_lora_refuses_bad_merges():
    adapter = LoRA(tensors())
    with pytest.raises(ValueError, match=r"LoRA is for a weight \[10, 12\], got \[10, 6\]"):
        adapter.merged(randn(OUT, 6))
    with pytest.raises(ValueError, match=r"only into a floating weight, got torch.int8"):
        adapter.merged(torch.zeros(OUT, IN, dtype=torch.int8))
    with pytest.raises(ValueError, match="runs merged only"):
        LoRA({"lora_A.weight": randn(3, IN, 3, 3), "lora_B.weight": randn(OUT, 3, 1, 1)}).delta(randn(7, IN))
    with pytest.raises(ValueError, match=r"rank must be 1 .. 3, got 4"):
        truncate(adapter.factors(), 4)
    with pytest.raises(ValueError, match="one weight per adapter, got 1 adapters, 2 weights"):
        concatenate([adapter.factors()], [1.0, 2.0])
    with pytest.raises(ValueError, match="no plain sum"):
        concatenate([Factors(randn(3, IN), randn(OUT, 3), column_scale=randn(OUT))])
    with pytest.raises(ValueError, match=r"must have one scale, got 1.0 and 2.0"):
        pissa_to_lora(adapter, LoRA(tensors(), alpha=6.0))


def test_lora_in_bfloat16_rounds_once():
    base, x = layer(OUT, IN, dtype=torch.bfloat16), randn(7, IN, dtype=torch.bfloat16)
    adapter = LoRA({k: v.bfloat16() for k, v in tensors().items()}, alpha=3.0)
    expected = (base(x).float() + (x.float() @ adapter.down.float().T) @ adapter.up.float().T).bfloat16()
    assert torch.equal(adapter(x, base), expected)
    weight, _ = adapter.merged(base.weight, base.bias)
    assert weight.dtype == torch.float32
