"""URPE attention: its dense definition, and that it tells positions apart where relative biases cannot."""

import math

import pytest
import torch
from torch import nn

from rfkernels.ops import attention
from rfkernels.variants.urpe import URPE, URPEAttention, relative_buckets
from tests.variants.plain import F64, close, draw, randomise

HEADS, D = 3, 4


def bucket(distance, buckets=32, most=128):
    """T5's, on one number."""
    side, exact = buckets // 2, buckets // 4
    far = abs(distance)
    if far >= exact:
        edges = [exact * (most / exact) ** (i / (side - exact)) for i in range(1, side)]
        steps = sum(far >= edge * (1 - 1e-9) for edge in edges)
        far = min(exact + steps, side - 1)
    return far + side * (distance > 0)


@pytest.mark.parametrize("buckets, most", [(32, 128), (8, 20), (4, 2), (32, 40)])
def test_buckets_are_those_of_t5(buckets, most):
    distances = list(range(-300, 301))
    ours = relative_buckets(torch.tensor(distances), buckets, most).tolist()
    assert ours == [bucket(d, buckets, most) for d in distances]
    assert sorted(set(ours)) == [b for b in range(buckets) if b != buckets // 2]  # 0 is not to the right


def dense(m, q, k, v, lengths=None):
    """softmax(q k^T / sqrt(d) + B) * C of [batch, heads, tokens, d], entry by entry."""
    rows, keys = q.shape[2], k.shape[2]
    of = lambda distance: bucket(distance, m.buckets, m.max_distance)
    index = torch.tensor([of(j - i) for i in range(rows) for j in range(keys)]).long().view(rows, keys)
    scores = q @ k.transpose(-1, -2) / math.sqrt(D)
    if m.bias is not None:
        scores = scores + m.bias[:, index]
    factor = m.factor[:, index].expand(len(q), -1, -1, -1)
    if lengths is not None:
        pad = torch.arange(keys) >= lengths[:, None, None, None]
        scores, factor = scores.masked_fill(pad, -torch.inf), factor.masked_fill(pad, 0.0)
    return (scores.softmax(-1) * factor) @ v


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows, keys", [(5, 5), (70, 70), (4, 9), (1, 6), (0, 3), (3, 0)])
def test_it_is_its_definition_with_its_gradients(rows, keys, bias):
    m = randomise(URPE(HEADS, bias=bias))
    q, k, v = (draw(2, HEADS, n, D, seed=i).requires_grad_() for i, n in enumerate((rows, keys, keys)))
    ours, theirs, weight = m(q, k, v), dense(m, q, k, v), draw(2, HEADS, rows, D, seed=9)
    close(ours, theirs)
    leaves = [q, k, v, *m.parameters()]
    for a, b in zip(*(torch.autograd.grad((t * weight).sum(), leaves) for t in (ours, theirs)), strict=True):
        close(a, b, 1e-11)
    swapped = m(*(t.transpose(1, 2) for t in (q, k, v)), layout="blhd").transpose(1, 2)
    close(swapped, theirs)


def test_padding_has_the_factor_zero():
    m, lengths = randomise(URPE(HEADS)), torch.tensor([3, 7])
    q, k, v = (draw(2, HEADS, 7, D, seed=i) for i in range(3))
    close(m(q, k, v, key_lengths=lengths), dense(m, q, k, v, lengths))


def test_it_is_plain_attention_at_first():
    q, k, v = (draw(2, HEADS, 9, D, seed=i) for i in range(3))
    close(URPE(HEADS).double()(q, k, v), attention(q, k, v), 1e-14)
    assert torch.equal(URPE(HEADS).factor, torch.ones(HEADS, 32))


def test_rows_need_not_sum_to_one():
    """Equal values: attention gives them back, URPE their sum of weights."""
    m = randomise(URPE(HEADS))
    q, k, v = draw(1, HEADS, 6, D), draw(1, HEADS, 6, D, seed=1), torch.ones(1, HEADS, 6, D, dtype=F64)
    with torch.no_grad():
        sums = m(q, k, v)[..., 0]
        assert (sums - 1).abs().min() > 1e-3 and sums.std(-1).min() > 1e-3
        m.factor.fill_(1)
        close(m(q, k, v), v, 1e-13)


def fitted(m, x, target):
    """The error that training leaves."""
    parameters = [p for p in m.parameters() if p.requires_grad]
    optimiser = torch.optim.LBFGS(parameters, 1.0, 40, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        error = (m(x) - target).square().mean()
        error.backward()
        return error

    optimiser.step(loss)
    return (m(x) - target).square().mean().item()


def test_only_with_the_factor_it_is_universal():
    """Equal tokens in, a function of the position out: out of reach with biases alone, whatever they are."""
    width, length = 6, 7
    x = draw(1, 1, width).expand(1, length, width)
    target = draw(1, length, 1, seed=3) * draw(1, 1, width, seed=4)
    least = (target - target.mean(1, keepdim=True)).square().mean().item()

    relative = randomise(URPEAttention(width, 2))
    relative.urpe.factor.requires_grad_(False).fill_(1)
    assert fitted(relative, x, target) > least * (1 - 1e-9)
    out = relative(x)
    close(out, out[:, :1].expand_as(out))

    universal = randomise(URPEAttention(width, 2))
    assert fitted(universal, x, target) < 1e-3 * least


def test_the_module_is_its_projections_around_it():
    m, x = randomise(URPEAttention(12, HEADS, bias=False)), draw(2, 5, 12)
    heads = lambda t: t.unflatten(-1, (HEADS, D)).transpose(1, 2)
    q, k, v = map(heads, nn.functional.linear(x, m.qkv.weight, m.qkv.bias).chunk(3, -1))
    close(m(x), m.out(dense(m.urpe, q, k, v).transpose(1, 2).flatten(2)))
    lengths = torch.tensor([5, 2])
    close(m(x, lengths)[1], m.out(dense(m.urpe, q, k, v, lengths).transpose(1, 2).flatten(2))[1])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_tokens(dtype):
    m, x = randomise(URPEAttention(12, HEADS)), draw(1, 9, 12)
    expected = m(x)
    out = m.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    close(out.double(), expected, {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype])


def test_refusals():
    for buckets, most in ((2, 128), (30, 128), (32, 8)):
        with pytest.raises(ValueError, match=f"a multiple of 4, .*got {buckets}, {most}"):
            URPE(HEADS, buckets, most)
    with pytest.raises(ValueError, match="heads must divide the width 10, got 3"):
        URPEAttention(10, 3)
