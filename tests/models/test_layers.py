"""Layers of blocks: what is joined without a copy, and what is not."""

import pytest
import torch

from rfkernels.models.layers import beside, joint

X = torch.arange(2 * 7 * 3.0).view(2, 7, 3)


def test_parts_of_one_tensor_are_joined_without_a_copy():
    whole = joint(X[:, :2], X[:, 2:])
    assert whole.data_ptr() == X.data_ptr() and torch.equal(whole, X)


@pytest.mark.parametrize(
    "first, second",
    [
        (X[:, 4:], X[:, :4]),
        (X[:, :2], X[:, 3:]),
        (X[:, :3], X[:, 2:]),
        (X[:, :2], X.clone()[:, 2:]),
        (X[:, :2], X[:, 2:].clone()),
        (X[:1, :2], X[1:, 2:]),
    ],
)
def test_others_are_copied(first, second):
    whole = joint(first, second)
    assert whole.data_ptr() != X.data_ptr() and torch.equal(whole, torch.cat([first, second], 1))


def test_gradients_of_parts():
    x = X.clone().requires_grad_()
    joint(x[:, :2], x[:, 2:]).square().sum().backward()
    assert torch.equal(x.grad, 2 * X)


@pytest.mark.parametrize("recorded", [False, True])
def test_beside(recorded):
    hidden = X.clone().requires_grad_(recorded)

    def activate(x, out=None):
        return -x if out is None else torch.neg(x, out=out)

    assert torch.equal(beside(2 * X, activate, hidden), torch.cat([2 * X, -X], -1))
