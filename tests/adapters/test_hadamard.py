import pytest
import torch

from rfkernels.adapters import hadamard
from rfkernels.adapters.hadamard import (
    QWHA,
    allocate,
    hadamard_block,
    hadamard_split,
    iwht,
    qwha_init,
    random_indices,
    wht,
)
from tests.adapters.layers import check_merge, check_round_trip, close, layer, randn

OUT = 10
ORDERS = [1, 2, 12, 20, 28, 36, 40, 60, 108, 140]


def dense(n):
    order, bits = hadamard_split(n)
    h = hadamard_block(order)
    for _ in range(bits):
        h = torch.kron(h, hadamard_block(2))
    return h


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_are_hadamard_matrices(order):
    h = hadamard_block(order)
    assert torch.equal(h.abs(), torch.ones_like(h))
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize(
    "order, index, row",
    [  # rows of the tables of QWHA's code, whose order its files rely on
        (12, 1, "++-+---+++-+"),
        (20, 1, "++-++----+-+-++++--+"),
        (28, 15, "+-+-++----++-+---+--++++--+-"),
        (36, 19, "+-++-+---++---+-++----+-+++--+++-+--"),
        (40, 21, "++-++----+-+-++++--+--+--++++-+-+----++-"),
        (60, 1, "++-+---+-+-++-++---+----++-----+++++--++++-+++--+--+-+-+++-+"),
        (
            108,
            2,
            "+++-+--++++------+-++-+++-+-+-+--++-----+----+-++---++"
            "--++--+++--+-++++-+++++--++-+-+-+---+--+-++++++----++-",
        ),
    ],
)
def test_blocks_are_those_of_qwha(order, index, row):
    h = hadamard_block(order)
    assert "".join("+" if v > 0 else "-" for v in h[index]) == row
    assert h[0].tolist().count(-1) == {12: 11, 20: 19, 28: 1, 36: 1, 40: 38, 60: 59, 108: 107}[order]


@pytest.mark.parametrize("n", [1, 2, 16, 64, 128, 4096, 12, 24, 112, 72, 40, 60, 80, 2560, 108, 280])
def test_fast_transform_is_the_dense_one(n):
    x, h = randn(3, 2, n), dense(n)
    close(wht(x), x @ h.T)
    close(iwht(x), x @ h / n)
    close(iwht(wht(x)), x)


def test_split_is_that_of_qwha():
    assert hadamard_split(3072) == (12, 8)
    assert hadamard_split(3584) == (28, 7)
    assert hadamard_split(5120) == (40, 7)
    assert hadamard_split(1152) == (36, 5)
    assert hadamard_split(256) == (1, 8)


def test_transform_takes_a_block():
    block = hadamard_block(12).flip(0)
    x = randn(3, 48)
    h = torch.kron(block, dense(4))
    close(wht(x, block), x @ h.T)
    close(iwht(wht(x, block), block), x)
    block_52 = torch.eye(52, dtype=torch.float64) * 52**0.5
    close(iwht(wht(randn(2, 104), block_52), block_52), randn(2, 104))


def spectrum(n, count=30, suffix=("", "")):
    return {
        f"qhft_spectrum{suffix[0]}": randn(count),
        f"qhft_indices{suffix[1]}": random_indices((OUT, n), count),
        f"qhft_scaling{suffix[1]}": torch.tensor(3.0),
        f"qhft_n_frequency{suffix[1]}": torch.tensor(count),
        f"qhft_random_loc_seed{suffix[1]}": torch.tensor(777),
    }


@pytest.mark.parametrize("rows", [7, 300])
@pytest.mark.parametrize("n", [16, 24])
def test_qwha_is_its_formula_dense_and_sparse(n, rows):
    made = spectrum(n)
    base, x = layer(OUT, n), randn(2, rows, n)
    f = torch.zeros(OUT, n, dtype=torch.float64)
    f[tuple(made["qhft_indices"])] = made["qhft_spectrum"]
    adapter = QWHA(made, (OUT, n))
    delta = 3 / OUT**0.5 * f @ dense(n) / n
    close(adapter(x, base), base(x) + x @ delta.T)
    close(adapter.delta_weight(torch.float64), delta)
    check_merge(adapter, base, x)
    assert adapter.factors() is None


def test_qwha_dense_and_sparse_paths_agree(monkeypatch):
    adapter, u = QWHA(spectrum(24), (OUT, 24)), randn(5, 24)
    sparse = adapter.apply_spectrum(u)
    monkeypatch.setattr(hadamard, "_SPARSE_ROWS", 0)
    close(adapter.apply_spectrum(u), sparse)


@pytest.mark.parametrize("suffix", [("", ""), (".default", "_default")])
def test_qwha_round_trip(suffix):
    check_round_trip(QWHA, spectrum(16, suffix=suffix), shape=(OUT, 16))


def test_qwha_draws_its_places_from_the_seed():
    made = spectrum(16)
    places = made.pop("qhft_indices")
    adapter = QWHA(made, (OUT, 16))
    assert torch.equal(adapter.positions, places)
    assert set(adapter.state_dict()) == set(made)


def test_allocation():
    weights = torch.tensor([1.0, 100.0, 2.0, 3.0])
    assert allocate(weights, 20, 8).tolist() == [4, 8, 4, 4]
    assert allocate(torch.ones(4), 10, 8).tolist() == [3, 3, 2, 2]
    assert allocate(torch.zeros(4), 6, 2).sum() == 6
    assert allocate(weights, 32, 8).tolist() == [8] * 4
    assert allocate(weights, 0, 8).tolist() == [0] * 4


def problem(out=OUT, n=48):
    weight, inputs = randn(out, n), randn(100, n) * torch.linspace(0.2, 3, n, dtype=torch.float64)
    return weight, (weight * 2).round() / 2, inputs


def test_start_repairs_what_quantisation_lost():
    weight, quantized, inputs = problem()
    adapter = qwha_init(weight, quantized, inputs, rank=3)
    assert len(adapter.spectrum) == 3 * (48 + OUT)
    gram = inputs.T @ inputs
    gram.diagonal().add_(1e-4 * gram.diagonal().mean())

    def error(delta):
        left = weight - quantized - delta
        return ((left @ gram) * left).sum()

    refined = error(adapter.delta_weight(torch.float64))
    f = torch.zeros(OUT, 48, dtype=torch.float64)
    f[tuple(adapter.positions)] = wht(weight - quantized)[tuple(adapter.positions)]
    assert refined < error(iwht(f)) < error(0)
    # the residual is orthogonal to the images of the chosen frequencies
    left = weight - quantized - adapter.delta_weight(torch.float64)
    inner = wht(left @ gram) / 48
    assert inner[tuple(adapter.positions)].abs().max() < 1e-9 * gram.abs().max()


def test_start_keeps_the_frequencies_of_largest_effect():
    weight, quantized, inputs = problem()
    adapter = qwha_init(weight, quantized, inputs, rank=3)
    gram = inputs.T @ inputs
    gram.diagonal().add_(1e-4 * gram.diagonal().mean())
    images = torch.linalg.cholesky(gram).T @ dense(48).T / 48  # column j: what frequency j adds to the output
    effect = images.square().sum(0) * wht(weight - quantized).square()
    kept = torch.zeros(OUT, 48, dtype=torch.bool)
    kept[tuple(adapter.positions)] = True
    for row, mask in zip(effect, kept, strict=True):
        assert row[mask].min() >= row[~mask].max()
    counts = allocate(wht(weight - quantized).norm(dim=1), 3 * (48 + OUT), 48)
    assert torch.equal(kept.sum(1), counts) and len(counts.unique()) > 1


def test_a_full_budget_restores_the_weight():
    weight, quantized, inputs = problem()
    adapter = qwha_init(weight, quantized, inputs, rank=100)
    torch.testing.assert_close(adapter.merged(quantized)[0], weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [52, 156, 172])
def test_orders_without_a_construction_are_refused(order):
    with pytest.raises(
        ValueError, match=f"order {order} needs a table that is not built in, pass it as block"
    ):
        wht(randn(2, order * 2))
    with pytest.raises(ValueError, match="needs a table"):
        QWHA(spectrum(order), (OUT, order))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: hadamard_block(44), r"order must be one of 1, 2, 12, 20, 28, 36, 40, 60, 108, 140, got 44"),
        (lambda: wht(randn(2, 44)), r"length must be 2\^m or kappa 2\^m, .*; got 44"),
        (
            lambda: wht(randn(2, 24), torch.ones(4, 4)),
            r"block must be \[12, 12\] for length 24, got \[4, 4\]",
        ),
        (lambda: QWHA(spectrum(16) | {"qhft_seed": torch.tensor(1)}, (OUT, 16)), "expected, got qhft_seed"),
        (lambda: QWHA({"qhft_spectrum": randn(3)}, (OUT, 16)), "missing: qhft_scaling"),
        (
            lambda: QWHA({"qhft_spectrum": randn(3), "qhft_scaling": torch.tensor(1.0)}, (OUT, 16)),
            "qhft_indices or qhft_random_loc_seed required",
        ),
        (lambda: QWHA(spectrum(32), (OUT, 16)), r"indices must lie in a weight \[10, 16\]"),
        (
            lambda: QWHA(spectrum(16) | {"qhft_indices": torch.zeros(2, 30, dtype=torch.int64)}, (OUT, 16)),
            "indices must be distinct",
        ),
        (
            lambda: QWHA(spectrum(16) | {"qhft_indices": torch.zeros(2, 3, dtype=torch.int64)}, (OUT, 16)),
            r"indices must be \[2, 30\], got \[2, 3\]",
        ),
        (
            lambda: QWHA(spectrum(16), (OUT, 16)).merged(torch.zeros(OUT, 16, dtype=torch.int8)),
            "only into a floating weight, got torch.int8: dequantise it first",
        ),
        (lambda: allocate(torch.ones(2), 9, 4), r"budget must be 0 .. 8, got 9"),
        (lambda: qwha_init(randn(4, 16), randn(4, 16), randn(7, 15)), r"got \[4, 16\], \[4, 16\], \[7, 15\]"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
