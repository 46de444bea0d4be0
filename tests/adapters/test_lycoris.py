import pytest
import torch

from rfkernels.adapters.lycoris import LoHa, LoKr
from tests.adapters.layers import check_factors, check_merge, check_round_trip, close, layer, randn

OUT, IN, RANK = 10, 12, 3
A, B, C, D = 2, 3, 5, 4


def loha(rank=RANK):
    sides = {"w1_a": (OUT, rank), "w1_b": (rank, IN), "w2_a": (OUT, rank), "w2_b": (rank, IN)}
    return {f"hada_{name}": randn(*shape, seed=i) for i, (name, shape) in enumerate(sides.items())}


def loha_tucker():
    sides = {"w1_a": (RANK, OUT), "w1_b": (RANK, IN), "w2_a": (RANK, OUT), "w2_b": (RANK, IN)}
    sides |= {"t1": (RANK, RANK, 3, 3), "t2": (RANK, RANK, 3, 3)}
    return {f"hada_{name}": randn(*shape, seed=i) for i, (name, shape) in enumerate(sides.items())}


W1 = {"lokr_w1": randn(A, B)}
W1_PRODUCT = {"lokr_w1_a": randn(A, RANK), "lokr_w1_b": randn(RANK, B)}
W2 = {"lokr_w2": randn(C, D)}
W2_PRODUCT = {"lokr_w2_a": randn(C, RANK), "lokr_w2_b": randn(RANK, D)}
LOKR = {
    "whole": W1 | W2,
    "left": W1_PRODUCT | W2,
    "right": W1 | W2_PRODUCT,
    "both": W1_PRODUCT | W2_PRODUCT,
}


def lokr_dense(made):
    w1 = made["lokr_w1"] if "lokr_w1" in made else made["lokr_w1_a"] @ made["lokr_w1_b"]
    w2 = made["lokr_w2"] if "lokr_w2" in made else made["lokr_w2_a"] @ made["lokr_w2_b"]
    return torch.kron(w1, w2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [RANK, 8, 9])
def test_loha_is_its_formula(rank, bias):
    base, x, made = layer(OUT, IN, bias), randn(2, 7, IN), loha(rank)
    adapter = LoHa(made, alpha=6.0)
    w1a, w1b, w2a, w2b = made.values()
    close(adapter(x, base), base(x) + 6 / rank * x @ ((w1a @ w1b) * (w2a @ w2b)).T)
    check_merge(adapter, base, x)
    if rank <= 8:
        check_factors(adapter, base, x)
        assert adapter.factors().down.shape[0] == rank**2
    else:
        assert adapter.factors() is None


@pytest.mark.parametrize("form", LOKR)
def test_lokr_is_its_formula(form):
    base, x, made = layer(OUT, IN), randn(2, 7, IN), LOKR[form]
    scale = 1.0 if form == "whole" else 2.0
    adapter = LoKr(made, alpha=6.0)
    close(adapter(x, base), base(x) + scale * x @ lokr_dense(made).T)
    check_merge(adapter, base, x)
    if form in ("right", "both"):
        check_factors(adapter, base, x)
    else:
        assert adapter.factors() is None


@pytest.mark.parametrize("shape", [(2, 30), (30, 2)])
def test_lokr_low_rank_form_splits_the_smaller_side(shape):
    made = {"lokr_w1": randn(*shape), **W2_PRODUCT}
    assert LoKr(made).factors().down.shape == (2 * RANK, shape[1] * D)
    close(LoKr(made).factors().up @ LoKr(made).factors().down, lokr_dense(made))
    assert LoKr({"lokr_w1": randn(30, 30), **W2_PRODUCT}).factors() is None


def test_lokr_alpha_rules():
    assert LoKr(LOKR["whole"], alpha=6.0).scale == 1.0
    assert LoKr(LOKR["whole"], alpha=6.0, convention="peft", rank=12).scale == 0.5
    assert LoKr(LOKR["left"] | {"alpha": torch.tensor(6.0)}).scale == 2.0
    assert LoKr(LOKR["both"]).scale == LoHa(loha()).scale == 1.0
    with pytest.raises(ValueError, match="needs rank where both factors are whole"):
        LoKr(LOKR["whole"], alpha=6.0, convention="peft")
    with pytest.raises(ValueError, match="the tensors have rank 3, got rank 4"):
        LoKr(LOKR["left"], rank=4)


def test_tucker_forms_of_convolutions():
    weight, made = randn(OUT, IN, 3, 3), loha_tucker()
    adapter = LoHa(made, alpha=6.0)
    one, two = (
        torch.einsum("ijkl,ip,jq->pqkl", made[f"hada_t{i}"], made[f"hada_w{i}_a"], made[f"hada_w{i}_b"])
        for i in "12"
    )
    close(adapter.merged(weight)[0], weight + 2 * one * two)
    assert adapter.factors() is None
    check_round_trip(LoHa, made)

    made = {
        **W1,
        "lokr_w2_a": randn(RANK, C),
        "lokr_w2_b": randn(RANK, D),
        "lokr_t2": randn(RANK, RANK, 3, 3),
    }
    w2 = torch.einsum("ijkl,ip,jq->pqkl", made["lokr_t2"], made["lokr_w2_a"], made["lokr_w2_b"])
    dense = torch.kron(made["lokr_w1"][:, :, None, None], w2.contiguous())
    close(LoKr(made, alpha=6.0).merged(weight)[0], weight + 2 * dense)
    assert LoKr(made).factors() is None
    check_round_trip(LoKr, made)


def test_lokr_of_a_convolution_without_tucker():
    weight = randn(OUT, IN, 3, 3)
    made = {**W1, "lokr_w2_a": randn(C, RANK), "lokr_w2_b": randn(RANK, D * 9)}
    dense = torch.kron(
        W1["lokr_w1"][:, :, None, None], (made["lokr_w2_a"] @ made["lokr_w2_b"]).view(C, D, 3, 3)
    )
    close(LoKr(made).merged(weight)[0], weight + dense)


@pytest.mark.parametrize("shape", [(OUT, 1), (1, IN)])
@pytest.mark.parametrize("family, made", [(LoHa, loha()), (LoKr, LOKR["both"])])
def test_dora_scale(family, made, shape):
    base, x = layer(OUT, IN), randn(7, IN)
    magnitude = randn(*shape).abs()
    adapter = family(made | {"dora_scale": magnitude}, alpha=6.0)
    v = base.weight + family(made, alpha=6.0).delta_weight(torch.float64)
    k = magnitude / torch.linalg.norm(v, dim=1 if shape[1] == 1 else 0, keepdim=True)
    close(adapter(x, base), x @ (k * v).T + base.bias)
    check_merge(adapter, base, x)
    assert adapter.factors(base.weight) is None


def test_round_trips():
    check_round_trip(LoHa, loha() | {"alpha": torch.tensor(4.0), "dora_scale": randn(OUT, 1)})
    for made in LOKR.values():
        check_round_trip(LoKr, made | {"alpha": torch.tensor(4.0)})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: LoHa({k: v for k, v in loha().items() if k != "hada_w2_b"}), "missing: hada_w2_b"),
        (lambda: LoHa(loha() | {"hada_t1": randn(3, 3)}), "hada_t1 and hada_t2 must come together"),
        (lambda: LoKr(W1), "lokr_w2, or lokr_w2_a and lokr_w2_b required, got lokr_w1"),
        (lambda: LoKr(W1 | W1_PRODUCT | W2), "lokr_w1, or lokr_w1_a and lokr_w1_b required"),
        (lambda: LoKr(W1 | W2 | {"lokr_t1": randn(2, 2)}), "unknown: lokr_t1"),
        (lambda: LoKr(W1 | W2, convention="kohya"), 'must be "lycoris" or "peft", got'),
        (lambda: LoHa(loha()).merged(randn(OUT, 13)), r"for a weight \[10, 12\], got \[10, 13\]"),
        (
            lambda: LoKr(W1 | W2).merged(torch.zeros(OUT, IN, dtype=torch.uint8)),
            "only into a floating weight",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def compare_with_peft(config, family, out, features, **hyper):
    peft = pytest.importorskip("peft")
    base, x = layer(out, features), randn(7, features)
    wrapped = peft.get_peft_model(torch.nn.Sequential(layer(out, features)), config(peft)).double().eval()
    state = peft.get_peft_model_state_dict(wrapped)
    adapter = family.from_state_dict(
        {k.removeprefix("base_model.model.0."): v for k, v in state.items()}, **hyper
    )
    with torch.no_grad():
        close(adapter(x, base), wrapped(x))
        merged = wrapped.merge_and_unload()[0].weight
    assert (merged - base.weight).abs().max() > 1e-3
    close(adapter.merged(base.weight)[0], merged.detach())


def test_loha_is_that_of_peft():
    compare_with_peft(
        lambda peft: peft.LoHaConfig(r=4, alpha=6, target_modules=["0"], init_weights=False),
        LoHa,
        10,
        12,
        alpha=6.0,
    )


@pytest.mark.parametrize("rank, both", [(2, False), (2, True), (32, False)])
def test_lokr_is_that_of_peft(rank, both):
    compare_with_peft(
        lambda peft: peft.LoKrConfig(
            r=rank, alpha=6, target_modules=["0"], init_weights=False, decompose_both=both
        ),
        LoKr,
        48,
        60,
        alpha=6.0,
        convention="peft",
        rank=rank,
    )
