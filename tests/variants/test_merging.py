import pytest
import torch
import torch.nn.functional as F

from rfkernels.ops.attention import attention
from rfkernels.variants import merging
from rfkernels.variants.merging import Pyra, match, size_bias
from tests.variants.reference import close, randn, randomise

BATCH, HEADS, D, WIDTH = 3, 2, 4, 6


def by_hand(keys, r, protected=()):
    """kept, [(source, destination)] of one sample, by the definition and its ties."""
    metric = keys.mean(1)
    metric = metric / metric.norm(dim=1, keepdim=True).clamp(min=1e-12)
    pairs = []
    for i in range(0, len(keys), 2):
        found = [(-float(metric[i] @ metric[j]), j) for j in range(1, len(keys), 2) if j not in protected]
        if i not in protected:
            pairs.append((min(found)[0], i, min(found)[1]))
    pairs = [(i, j) for _, i, j in sorted(pairs)[:r]]
    return [i for i in range(len(keys)) if i not in [s for s, _ in pairs]], pairs


@pytest.mark.parametrize("tokens", [2, 7, 16])
@pytest.mark.parametrize("rows", [1024, 2])
def test_match_is_its_definition(tokens, rows, monkeypatch):
    monkeypatch.setattr(merging, "_ROWS", rows)
    keys = randn(BATCH, tokens, HEADS, D, seed=tokens)
    for r in range((tokens + 1) // 2 + 1):
        found = match(keys, r)
        for b in range(BATCH):
            kept, pairs = by_hand(keys[b], r)
            assert found.kept[b].tolist() == kept
            target = found.kept[b][found.target[b]].tolist()
            assert list(zip(found.source[b].tolist(), target, strict=True)) == pairs


def test_protected_tokens_merge_with_nothing():
    keys = randn(BATCH, 10, HEADS, D, seed=1)
    keys[:, 3] = keys[:, 0]  # the best pair of all, were it allowed
    found = match(keys, 4, protected=(0, 3))
    for b in range(BATCH):
        kept, pairs = by_hand(keys[b], 4, (0, 3))
        assert found.kept[b].tolist() == kept and {0, 3} <= set(kept)
        assert 3 not in [j for _, j in pairs] and found.source[b].tolist() == [i for i, _ in pairs]


def test_of_equal_scores_the_lowest_indices():
    found = match(torch.ones(1, 8, HEADS, D, dtype=torch.float64), 2)
    assert found.source.tolist() == [[0, 2]] and found.kept[0][found.target[0]].tolist() == [1, 1]


@pytest.mark.parametrize("r", [0, 1, 4])
def test_mass_is_conserved_and_means_are_weighted(r):
    x, size = randn(BATCH, 9, WIDTH), randn(BATCH, 9, seed=1).abs() + 0.5
    found = match(randn(BATCH, 9, HEADS, D, seed=2), r)
    y, total = found.merge(x, size)
    close((total[..., None] * y).sum(1), (size[..., None] * x).sum(1))
    close(total.sum(1), size.sum(1))
    for b in range(BATCH):
        for place, position in enumerate(found.kept[b].tolist()):
            group = [position, *found.source[b][found.target[b] == place].tolist()]
            close(y[b, place], (size[b, group, None] * x[b, group]).sum(0) / size[b, group].sum())
    if r == 0:
        close(y, x)


def test_merging_twice_counts_the_tokens():
    x = randn(BATCH, 12, WIDTH)
    size = None
    for r in (4, 3):
        found = match(x, r)
        x, size = found.merge(x, size)
    close((size[..., None] * x).sum(1), randn(BATCH, 12, WIDTH).sum(1))
    assert size.sum(1).tolist() == [12.0] * BATCH and size.max() > 2


def test_unmerge_copies_and_merging_again_changes_nothing():
    x, found = randn(BATCH, 11, WIDTH), match(randn(BATCH, 11, HEADS, D, seed=2), 5)
    y, size = found.merge(x)
    back = found.unmerge(y)
    assert back.shape == x.shape
    assert torch.equal(back.gather(1, found.kept[..., None].expand_as(y)), y)
    for b in range(BATCH):
        for source, target in zip(found.source[b], found.target[b], strict=True):
            assert torch.equal(back[b, source], y[b, target])
    again, same = found.merge(back)
    close(again, y)
    close(same, size)
    close(found.unmerge(again), back)


def test_attention_with_sizes_is_that_of_the_copies():
    """Keys that are equal may merge: attention over what is left, with log size, is attention over all."""
    k, v = randn(1, 1, 8, D, seed=3), randn(1, 1, 8, D, seed=4)
    k[..., 1::2, :], v[..., 1::2, :] = k[..., ::2, :], v[..., ::2, :]
    q = randn(1, 1, 5, D, seed=5)
    found = match(k[0], 3)
    (k_less, size), (v_less, _) = found.merge(k[0]), found.merge(v[0])
    less = attention(q, k_less[None], v_less[None], bias=size_bias(size))
    close(less, F.scaled_dot_product_attention(q, k, v))


def test_pyra_is_plain_merging_at_first_and_its_formula_after():
    x, size = randn(BATCH, 9, WIDTH), randn(BATCH, 9, seed=1).abs() + 0.5
    found = match(randn(BATCH, 9, HEADS, D, seed=2), 3)
    close(found.merge(x, size, Pyra(WIDTH, 3).double())[0], found.merge(x, size)[0])
    p = randomise(Pyra(WIDTH, 3), 7)
    y, total = found.merge(x, size, p)
    for b in range(BATCH):
        mass = size[b, :, None] * x[b]
        s, d = mass[found.source[b]], mass[found.kept[b][found.target[b]]]
        m = F.layer_norm(s + d, (WIDTH,), p.pyra_norm.weight, p.pyra_norm.bias)
        w1 = 2 * torch.sigmoid(p.pyra_a[:, 0] @ m)
        w2 = 2 * torch.sigmoid(m @ p.pyra_b[0]) - 1
        s = s + s * w1[None] * w2[:, None]
        out = mass[found.kept[b]]
        for row, target in zip(s, found.target[b], strict=True):
            out[target] += row
        close(y[b], out / total[b][:, None])
    assert set(p.state_dict()) == {"pyra_a", "pyra_b", "pyra_norm.weight", "pyra_norm.bias"}


def test_gradients_reach_tokens_and_modulation():
    x, p = randn(BATCH, 8, WIDTH).requires_grad_(), Pyra(WIDTH, 3).double()
    found = match(x, 3)
    loss = lambda x: found.unmerge(found.merge(x, None, p)[0]).square().sum()
    torch.autograd.gradcheck(loss, x)
    loss(x).backward()
    assert p.pyra_b.grad.abs().max() > 0


def test_nothing_looks_at_the_numbers():
    keys = torch.empty(2, 8, HEADS, D, device="meta")
    assert match(keys, 3).merge(torch.empty(2, 8, WIDTH, device="meta"))[0].shape == (2, 5, WIDTH)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: match(randn(8, 4), 2), r"\[batch, tokens, d\], got \[8, 4\]"),
        (lambda: match(randn(1, 8, 4), 2).merge(randn(1, 8, 4), randn(1, 6)), r"size must be \[1, 8\]"),
        (lambda: match(randn(1, 8, 2, 4), 5), r"r must be in 0 .. 4 for 8 tokens, got 5"),
        (lambda: match(randn(1, 8, 2, 4), 4, protected=[2]), r"r must be in 0 .. 3"),
        (lambda: match(randn(1, 2, 2, 4), 1, protected=[1]), r"r must be in 0 .. 0"),
        (lambda: match(randn(1, 8, 2, 4), 2).merge(randn(1, 7, 3)), r"\[batch, 8, width\], got \[1, 7, 3\]"),
        (lambda: match(randn(1, 8, 2, 4), 2).unmerge(randn(1, 8, 3)), r"\[1, 6\] tokens, got \[1, 8, 3\]"),
        (
            lambda: match(randn(1, 8, 4), 2).merge(randn(1, 8, 4), None, Pyra(4, 3).double()),
            "3 merging tokens",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
