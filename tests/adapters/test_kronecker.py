import pytest
import torch

from rfkernels.adapters.kronecker import (
    SoKA,
    choose_rank,
    factorization,
    kpsvd,
    kron_apply,
    kron_sum,
    soka_init,
)
from tests.adapters.layers import check_merge, check_round_trip, close, layer, randn

A, B, C, D, R = 2, 3, 5, 4, 2


def test_kron_apply_is_the_dense_product():
    left, right, x = randn(R, A, B), randn(R, C, D), randn(2, 7, B * D)
    dense = sum(torch.kron(u, v) for u, v in zip(left, right, strict=True))
    close(kron_sum(left, right), dense)
    close(kron_apply(x, left, right), x @ dense.T)
    close(kron_apply(x, left[0], right[0]), x @ torch.kron(left[0], right[0]).T)


def test_kpsvd_reproduces_the_weight_and_loses_its_tail():
    weight = randn(A * C, B * D)
    u, sigma, v = kpsvd(weight, (A, B))
    assert torch.equal(sigma, sigma.sort(descending=True).values)
    close(kron_sum(sigma[:, None, None] * u, v), weight)
    short = kron_sum(sigma[:R, None, None] * u[:R], v[:R])
    close((weight - short).square().sum(), sigma[R:].square().sum())


def test_kpsvd_finds_a_kronecker_product():
    weight = 3 * torch.kron(randn(A, B), randn(C, D))
    _, sigma, _ = kpsvd(weight, (A, B))
    close(sigma[1:], torch.zeros_like(sigma[1:]))


@pytest.mark.parametrize(
    "sigma, energy, rank",
    [
        ([10.0, 0.1, 0.09, 0.08], 0.9, 1),  # one term holds the energy
        ([4.0, 3.9, 3.8, 0.01, 0.009, 0.008], 1.0, 4),  # the elbow: first value after the drop
        ([1.0, 1.0, 1.0, 1.0], 0.9, 4),  # flat: no elbow, 90 % need all four
        ([1.0, 1.0, 1.0, 1.0], 0.5, 2),
        ([2.0, 1.0], 1.0, 2),
        ([5.0], 0.9, 1),
        ([0.0, 0.0, 0.0], 0.9, 1),
    ],
)
def test_rank_choice(sigma, energy, rank):
    assert choose_rank(torch.tensor(sigma), energy) == rank


@pytest.mark.parametrize("bias", [True, False])
def test_soka_merges_and_round_trips(bias):
    made = {"soka_u": randn(R, A, B), "soka_v": randn(R, C, D), "soka_sigma": randn(R)}
    base, x = layer(A * C, B * D, bias), randn(2, 7, B * D)
    check_merge(SoKA(made), base, x)
    dense = sum(s * torch.kron(u, v) for u, v, s in zip(*made.values(), strict=True))
    close(SoKA(made)(x, base), base(x) + x @ dense.T)
    check_round_trip(SoKA, made)
    assert SoKA(made).factors(base.weight) is None


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("method", ["zero", "pissa"])
def test_soka_starts_as_the_layer(method, rank):
    base, x = layer(12, 20), randn(7, 20)
    adapter, weight = soka_init(base.weight, rank=rank, method=method)
    assert adapter.soka_u.shape[1:] == (3, 4) and adapter.soka_v.shape[1:] == (4, 5)
    if rank is not None:
        assert len(adapter.soka_sigma) == rank
    assert (adapter.soka_v.abs().max() == 0) == (method == "zero")
    assert torch.equal(weight, base.weight) == (method == "zero")
    close(adapter(x, lambda x: x @ weight.T + base.bias), base(x))


def test_soka_chooses_its_rank_by_energy():
    weight = 100 * torch.kron(randn(3, 4), randn(4, 5)) + 1e-3 * randn(12, 20)
    assert len(soka_init(weight, energy=0.99)[0].soka_sigma) == 1


def test_soka_trains_in_plain_torch():
    adapter, weight = soka_init(randn(12, 20), rank=2, method="pissa")
    adapter.requires_grad_()
    adapter(randn(7, 20), lambda x: x @ weight.T).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kpsvd(randn(10, 12), (3, 3)), r"\(3, 3\) must divide the weight's axes, got \[10, 12\]"),
        (
            lambda: kron_apply(randn(7, 13), randn(A, B), randn(C, D)),
            r"x must be \[\*lead, 12\], got \[7, 13\]",
        ),
        (lambda: choose_rank(torch.ones(2), 0.0), r"energy must lie in \(0, 1\], got 0.0"),
        (lambda: soka_init(randn(12, 20), rank=13), r"rank must be 1 .. 12, got 13"),
        (lambda: soka_init(randn(12, 20), method="random"), 'method must be "zero" or "pissa"'),
        (lambda: factorization(12, 0), "factor -1 or >= 1, got 12, 0"),
        (
            lambda: SoKA({"soka_u": randn(2, 2, 3), "soka_v": randn(1, 5, 4), "soka_sigma": randn(2)}),
            r"u \[r, a, b\], v \[r, c, d\], sigma \[r\] required",
        ),
        (
            lambda: SoKA({"soka_u": randn(1, 2, 3), "soka_v": randn(1, 5, 4), "soka_sigma": randn(1)}).merged(
                randn(10, 13)
            ),
            r"for a weight \[10, 12\], got \[10, 13\]",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_factorization_is_that_of_peft():
    lokr = pytest.importorskip("peft.tuners.lokr.layer")
    for factor in (-1, 2, 3, 4, 5, 8, 16):
        for dimension in range(1, 130):
            assert factorization(dimension, factor) == tuple(sorted(lokr.factorization(dimension, factor)))
