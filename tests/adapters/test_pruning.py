import pytest
import torch
import torch.nn.functional as F

from rfkernels.adapters.pruning import SPLoPA, SPLoRA, SPPaRA
from tests.adapters.layers import check_factors, check_merge, check_round_trip, close, layer, randn

OUT, IN, RANK = 10, 12, 3
KEEP_OUT, KEEP_IN = randn(OUT) > -0.5, randn(IN) > -0.5
MASKS = {"in_features_mask": KEEP_IN, "out_features_mask": KEEP_OUT}
SPLORA = {"adapter.cols": randn(1, OUT, RANK), "adapter.rows": randn(1, RANK, IN)}
SPPARA = {"adapter": randn(IN, OUT)}
SPLOPA = {
    "adapter.pos_weights": randn(4, 5, 3),
    "adapter.prototypes.cols": randn(4, 2, 1),
    "adapter.prototypes.rows": randn(4, 1, 4),
}
DELTA = {
    SPLoRA: SPLORA["adapter.cols"][0] @ SPLORA["adapter.rows"][0],
    SPPaRA: SPPARA["adapter"].T,
    SPLoPA: sum(torch.kron(pos, c @ r) for pos, c, r in zip(*SPLOPA.values(), strict=True)),
}
FAMILIES = [(SPLoRA, SPLORA), (SPPaRA, SPPARA), (SPLoPA, SPLOPA)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("family, made", FAMILIES)
def test_adapters_are_their_formula(family, made, bias):
    base, x = layer(OUT, IN, bias), randn(2, 7, IN)
    adapter = family(made | {"adapter_bias": randn(OUT, seed=8)})
    close(adapter(x, base), base(x) + x @ DELTA[family].T + randn(OUT, seed=8))
    check_merge(adapter, base, x)
    if family is SPLoRA:
        check_factors(adapter, base, x)
    check_round_trip(family, made | {"adapter_bias": randn(OUT)})
    check_round_trip(family, made)


@pytest.mark.parametrize("family, made", FAMILIES[:2])
def test_slice_after_merge_is_merge_after_slice(family, made):
    base, x = layer(OUT, IN), randn(7, IN)
    adapter = family(made | MASKS | {"adapter_bias": randn(OUT, seed=8)})
    weight, bias = adapter.sliced(base.weight, base.bias)
    assert weight.shape == (KEEP_OUT.sum(), KEEP_IN.sum())
    small = adapter.slice()
    merged = small.merged(base.weight[KEEP_OUT][:, KEEP_IN], base.bias[KEEP_OUT])
    close(merged[0], weight)
    close(merged[1], bias)
    masked, masked_bias = adapter.merged(base.weight, base.bias)
    close(masked, (base.weight + DELTA[family]) * torch.outer(KEEP_OUT, KEEP_IN))
    y = F.linear(x, masked, masked_bias)
    close(y[:, KEEP_OUT], F.linear(x[:, KEEP_IN], weight, bias))
    assert torch.equal(y[:, ~KEEP_OUT], torch.zeros_like(y[:, ~KEEP_OUT]))
    close(adapter(x, base), y)
    assert adapter.factors(base.weight) is None
    check_round_trip(family, made | MASKS)


@pytest.mark.parametrize("mask", MASKS)
def test_one_mask_alone(mask):
    adapter = SPLoRA(SPLORA | {mask: MASKS[mask]})
    keep = MASKS[mask] if mask.startswith("in") else MASKS[mask][:, None]
    close(adapter.merged(randn(OUT, IN))[0], (randn(OUT, IN) + DELTA[SPLoRA]) * keep)


@pytest.mark.parametrize("family, made", FAMILIES)
def test_convolutions_change_their_centre_tap(family, made):
    weight, x = randn(OUT, IN, 3, 5), randn(2, IN, 8, 8)
    merged, _ = family(made).merged(weight)
    delta = DELTA[family][:, :, None, None]
    close(F.conv2d(x, merged), F.conv2d(x, weight) + F.conv2d(x, delta)[:, :, 1:-1, 2:-2])


def test_convolutions_are_masked_and_sliced_too():
    weight, adapter = randn(OUT, IN, 3), SPLoRA(SPLORA | MASKS)
    close(adapter.merged(weight)[0][KEEP_OUT][:, KEEP_IN], adapter.sliced(weight)[0])
    assert adapter.merged(weight)[0][~KEEP_OUT].abs().max() == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: SPLoRA(SPLORA | {"adapter.cols": randn(1, OUT, 2)}), r"got \[1, 10, 2\], \[1, 3, 12\]"),
        (lambda: SPLoRA(SPLORA | {"adapter.cols": randn(2, OUT, 3)}), r"cols \[1, out, r\]"),
        (lambda: SPLoRA(SPLORA).merged(randn(OUT, IN, 2)), "a kernel needs a centre"),
        (lambda: SPLoRA(SPLORA).merged(randn(OUT, 11)), r"for a weight \[10, 12\], got \[10, 11\]"),
        (
            lambda: SPLoRA(SPLORA).merged(torch.zeros(OUT, IN, dtype=torch.int8)),
            "only into a floating weight",
        ),
        (
            lambda: SPLoRA(SPLORA | {"in_features_mask": KEEP_OUT}).merged(randn(OUT, IN)),
            r"in_features_mask must be \[12\], got \[10\]",
        ),
        (
            lambda: SPLoPA(SPLOPA | {"adapter.prototypes.rows": randn(3, 1, 4)}),
            r"\[P, p, 1\], \[P, 1, q\] required",
        ),
        (lambda: SPLoPA(SPLOPA | MASKS), "unknown: in_features_mask, out_features_mask"),
        (lambda: SPPaRA({}), "missing: adapter"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
