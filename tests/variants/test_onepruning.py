import itertools

import pytest
import torch

from rfkernels.variants.dit import compacted
from rfkernels.variants.onepruning import (
    choose_units,
    gram_distance,
    logit_error,
    prune,
    trajectory_importance,
    unit_macs,
    velocity_error,
)
from tests.variants.reference import block, close, forward, randn

WIDTH, HEADS, TOKENS, BATCH, LAYERS = 16, 4, 5, 2, 3
BLOCKS = [block(seed=i) for i in range(LAYERS)]


def inputs():
    return randn(BATCH, TOKENS, WIDTH, seed=1), randn(BATCH, WIDTH, seed=2)


def head(x, c):
    return x[..., :6] * c[:, None, :6]


def kl(x, y):
    p, q = (x / 4).softmax(-1), (y / 4).softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


def gram(x):
    x = x.flatten(0, 1)
    x = x / x.norm(dim=1, keepdim=True)
    return x @ x.T


@pytest.mark.parametrize(
    "error, by_hand",
    [
        (velocity_error, lambda x, y: ((x - y) ** 2).mean()),
        (
            logit_error,
            lambda x, y: (
                ((x / 4).softmax(-1) * ((x / 4).log_softmax(-1) - (y / 4).log_softmax(-1))).sum(-1).mean()
            ),
        ),
    ],
)
def test_importance_is_what_a_mask_does_to_all_that_follows(error, by_hand):
    x, c = inputs()
    heads, groups = trajectory_importance(BLOCKS, x, c, head, groups=8, weight=2.0, error=error)
    assert heads.shape == (LAYERS, HEADS) and groups.shape == (LAYERS, 8)
    whole = [x]
    for b in BLOCKS:
        whole.append(forward(b, whole[-1], c))
    for kind, scores in (("heads", heads), ("groups", groups)):
        for layer, unit in itertools.product(range(LAYERS), (0, 2)):
            mask = torch.ones(scores.shape[1])
            mask[unit] = 0
            y, expected = forward(BLOCKS[layer], whole[layer], c, **{kind: mask}), 0
            for later in range(layer + 1, LAYERS):
                y = forward(BLOCKS[later], y, c)
                expected = expected + (gram(whole[later + 1]) - gram(y)).square().sum()
            expected = expected + 2 * by_hand(head(whole[-1], c), head(y, c))
            torch.testing.assert_close(scores[layer, unit], expected, rtol=1e-8, atol=1e-12)


def test_a_unit_that_does_nothing_has_no_importance():
    blocks = [block(seed=i) for i in range(2)]
    blocks[0].attn.proj.weight[:, 4:8] = 0  # head 1
    blocks[0].mlp.fc2.weight[:, 16:24] = 0  # group 2 of 4
    heads, groups = trajectory_importance(blocks, *inputs(), head)
    assert heads[0, 1].abs() < 1e-20 and groups[0, 2].abs() < 1e-20
    assert (heads > 1e-9).sum() == 7 and (groups > 1e-9).sum() == 7


def test_a_unit_matters_the_same_wherever_it_stands():
    """The published code multiplies by a factor of the index."""
    swapped = block(seed=1)
    order = torch.tensor([2, 0, 3, 1])
    wide = (order[:, None] * 4 + torch.arange(4)).flatten()
    for p in (swapped.attn.qkv.weight, swapped.attn.qkv.bias):
        p.copy_(p[torch.cat([wide, wide + 16, wide + 32])])
    swapped.attn.proj.weight.copy_(swapped.attn.proj.weight[:, wide])
    plain = trajectory_importance([BLOCKS[0], block(seed=1)], *inputs(), head)[0]
    moved = trajectory_importance([BLOCKS[0], swapped], *inputs(), head)[0]
    close(moved[1], plain[1][order])
    close(moved[0], plain[0])


def test_gram_distance_is_blind_to_rotation_and_length():
    x, y = randn(7, 5), randn(7, 5, seed=1)
    turn = torch.linalg.qr(randn(5, 5, seed=2)).Q
    close(gram_distance(3 * x @ turn, y @ turn), gram_distance(x, y))
    close(gram_distance(x, x @ turn), torch.zeros((), dtype=torch.float64))
    assert gram_distance(x, y) > 1


def test_rows_are_drawn_once_and_limit_the_comparison():
    x, c = inputs()
    draw = lambda seed, rows: trajectory_importance(
        BLOCKS, x, c, weight=0.0, rows=rows, generator=torch.Generator().manual_seed(seed)
    )[0]
    assert torch.equal(draw(0, 4), draw(0, 4)) and not torch.equal(draw(0, 4), draw(1, 4))
    close(draw(0, 999), draw(1, 999))
    assert not draw(0, 999)[-1].any() and (draw(0, 999)[:-1] > 0).all()  # nothing follows the last block


@pytest.mark.parametrize("budget", [24, 30, 40, 51, 58])
def test_choice_is_the_best_under_its_budget(budget):
    heads, groups, costs = randn(2, 2, seed=3).abs(), randn(2, 3, seed=4).abs(), (7, 5)
    masks = choose_units(heads, groups, costs, budget)
    best = 0.0
    for bits in itertools.product([False, True], repeat=10):
        h, g = torch.tensor(bits[:4]).view(2, 2), torch.tensor(bits[4:]).view(2, 3)
        alive = all(m[i, s[i].argmax()] for m, s in ((h, heads), (g, groups)) for i in range(2))
        if alive and 7 * h.sum() + 5 * g.sum() <= budget:
            best = max(best, float(heads[h].sum() + groups[g].sum()))
    assert float(heads[masks[0]].sum() + groups[masks[1]].sum()) == pytest.approx(best, rel=1e-12)
    assert 7 * masks[0].sum() + 5 * masks[1].sum() <= budget
    assert masks[0].any(1).all() and masks[1].any(1).all()


def test_pruned_blocks_cost_what_was_asked_and_err_less_than_the_opposite_choice():
    x, c = inputs()
    found = trajectory_importance(BLOCKS, x, c, head)
    costs = unit_macs(BLOCKS[0], TOKENS, HEADS)
    assert costs == (4 * 5 * 16 * 4 + 2 * 25 * 4, 2 * 5 * 16 * 8)
    budget = 0.7 * LAYERS * HEADS * sum(costs)
    out = lambda blocks: [y := x, *[y := b(y, c) for b in blocks]][-1]
    errors = []
    for scores in (found, [1 / t for t in found]):
        masks = choose_units(*scores, costs, budget)
        assert sum(int(m.sum()) * cost for m, cost in zip(masks, costs, strict=True)) <= budget
        small = prune(BLOCKS, *masks)
        close(out(small), out([compacted(b, *m) for b, *m in zip(BLOCKS, *masks, strict=True)]))
        errors.append((out(small) - out(BLOCKS)).square().mean())
    assert errors[0] < errors[1]
    close(out(prune(BLOCKS, *choose_units(*found, costs, 1e9))), out(BLOCKS))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: choose_units(-randn(2, 3).abs(), randn(2, 4).abs(), (7, 5), 99), "finite importance"),
        (lambda: choose_units(randn(2, 3) * torch.nan, randn(2, 4).abs(), (7, 5), 99), "finite importance"),
        (lambda: choose_units(randn(2, 3).abs(), randn(2, 4).abs(), (7, 5), 23), "a budget of 24 or more"),
        (lambda: choose_units(randn(2, 3).abs(), randn(2, 4).abs(), (0, 5), 99), "positive costs"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
