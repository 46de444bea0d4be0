import pytest
import torch

from rfkernels.variants.tokens import Selection, best_tokens, select
from tests.variants.reference import randn

KEEP = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
SCORES = torch.tensor([[9, 1, 3, 9, 2], [9, 9, 9, 0, 9], [1, 2, 3, 4, 5]]).double()


def chosen(selection):
    return [set(i[v].tolist()) for i, v in zip(selection.index, selection.valid, strict=True)]


@pytest.mark.parametrize("room", [None, 3, 5])
def test_select_takes_the_mask(room):
    found = select(KEEP, room)
    assert found.index.shape == (3, room or 3) and chosen(found) == [{1, 2, 4}, {3}, set()]
    assert found.lengths.tolist() == [3, 1, 0]
    for row, length in zip(found.valid, found.lengths, strict=True):  # first those that are valid
        assert row[:length].all() and not row[length:].any()


def test_a_small_room_takes_the_best_or_the_first():
    assert chosen(select(KEEP, 2, SCORES)) == [{2, 4}, {3}, set()]
    assert chosen(select(KEEP, 2)) == [{1, 2}, {3}, set()]
    assert select(KEEP[2:]).index.shape == (1, 1)


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 2), (3, 5, 2, 4)])
def test_put_changes_the_valid_rows_alone(shape):
    x, found = randn(*shape), select(KEEP, 4)
    rows = found.take(x)
    assert torch.equal(rows[0, :3], x[0, [1, 2, 4]])
    y = found.put(x, torch.full_like(rows, 7.0))
    assert (y[KEEP] == 7).all() and torch.equal(y[~KEEP], x[~KEEP])
    assert torch.equal(Selection(found.index).put(x, rows), x)


def test_rows_that_are_not_valid_may_hold_anything():
    x, found = randn(3, 5, 2), select(KEEP, 4)
    y = found.put(x, torch.full_like(found.take(x), torch.nan))
    assert torch.equal(y.isnan().all(-1), KEEP)


def test_best_tokens_come_in_their_order_and_of_equal_ones_the_first():
    assert best_tokens(SCORES, 2).index.tolist() == [[0, 3], [0, 1], [3, 4]]
    assert best_tokens(SCORES, 2).lengths.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: select(KEEP.int()), r"keep must be bool\[batch, tokens\], got torch.int32 \[3, 5\]"),
        (lambda: select(KEEP, 2, SCORES[:1]), r"scores must be \[3, 5\], got \[1, 5\]"),
        (lambda: select(KEEP[0]), r"got torch.bool \[5\]"),
        (lambda: select(KEEP, 0), "room must be in 1 .. 5, got 0"),
        (lambda: best_tokens(SCORES, 6), r"count must be in 1 .. tokens, got 6, \[3, 5\]"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
