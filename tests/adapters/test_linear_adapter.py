import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rfkernels.adapters.linear_adapter import LinearAdapter, shift_heads
from tests.adapters.layers import check_factors, check_merge, check_round_trip, close, layer, randn

OUT, IN, RANK = 10, 12, 4


def tensors(width):
    return {
        "D_fc1.weight": randn(RANK, width),
        "D_fc1.bias": randn(RANK, seed=1),
        "D_fc2.weight": randn(width, RANK, seed=2),
        "D_fc2.bias": randn(width, seed=3),
    }


def transform(made, x, s):
    w1, b1, w2, b2 = made.values()
    return x + s * ((x @ w1.T + b1) @ w2.T + b2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("position, width", [("before", IN), ("after", OUT)])
def test_linear_adapters_merge(position, width, bias):
    base, x, made = layer(OUT, IN, bias), randn(2, 7, IN), tensors(width)
    adapter = LinearAdapter(made, position, scale=0.3)
    before = position == "before"
    expected = base(transform(made, x, 0.3)) if before else transform(made, base(x), 0.3)
    close(adapter(x, base), expected)
    check_merge(adapter, base, x)
    check_factors(adapter, base, x)
    check_round_trip(LinearAdapter, made, position=position)


def test_q_k_and_v_that_share_one():
    """A fused qkv weight merges as one, three separate ones each, to the same numbers."""
    qkv, adapter = layer(3 * IN, IN), LinearAdapter(tensors(IN), scale=0.3)
    weight, bias = adapter.merged(qkv.weight, qkv.bias)
    parts = [adapter.merged(w, b) for w, b in zip(qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True)]
    close(torch.cat([w for w, _ in parts]), weight)
    close(torch.cat([b for _, b in parts]), bias)
    x = randn(7, IN)
    close(F.linear(x, weight, bias), qkv(transform(tensors(IN), x, 0.3)))


def test_one_before_and_one_after_merge_in_turn():
    base, x = layer(OUT, IN), randn(7, IN)
    before, after = LinearAdapter(tensors(IN)), LinearAdapter(tensors(OUT), "after")
    weight, bias = after.merged(*before.merged(base.weight, base.bias))
    close(F.linear(x, weight, bias), after(x, lambda x: before(x, base)))


def test_shifted_heads_attend_to_neighbouring_frames():
    """12 heads, divisor 12: head 0 sees frame t - 1, head 1 frame t + 1, at the ends their own."""
    batch, frames, n, heads, width = 2, 4, 5, 12, 3
    q, k, v = (randn(batch * frames, n, heads * width, seed=i) for i in range(3))

    def attend(q, k, v):
        q, k, v = (t.unflatten(-1, (heads, width)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)

    shifted = attend(q, shift_heads(k, frames), shift_heads(v, frames))
    index = torch.arange(batch * frames).view(batch, frames)
    earlier = torch.cat([index[:, :1], index[:, :-1]], 1).flatten()
    later = torch.cat([index[:, 1:], index[:, -1:]], 1).flatten()
    for head, frame in ((0, earlier), (1, later), (2, index.flatten()), (11, index.flatten())):
        close(shifted[:, head], attend(q, k[frame], v[frame])[:, head])


def test_shift_with_stride_and_far_heads():
    tokens = randn(6, 2, 12)
    out = shift_heads(tokens, 6, divisor=4, stride=3, long_divisor=6)
    expected = tokens.clone()
    expected[3:, :, :3], expected[:3, :, 3:6] = tokens[:3, :, :3], tokens[3:, :, 3:6]
    expected[2:, :, 6:8] = tokens[:4, :, 6:8]
    assert torch.equal(out, expected)
    assert torch.equal(shift_heads(tokens, 1, 4), tokens)
    assert torch.equal(shift_heads(tokens[:2], 2, 4, stride=3), tokens[:2])


def test_gradients_are_those_of_plain_torch():
    base, x = layer(OUT, IN), randn(7, IN)
    adapter = LinearAdapter(tensors(IN)).requires_grad_()
    adapter(x, nn.Sequential(base)).square().sum().backward()
    plain = {k: v.clone().requires_grad_() for k, v in tensors(IN).items()}
    base(transform(plain, x, 1.0)).square().sum().backward()
    for name, tensor in plain.items():
        close(adapter.tensor(name).grad, tensor.grad)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: LinearAdapter(tensors(IN), "beside"), 'position must be "before" or "after"'),
        (lambda: LinearAdapter(tensors(IN) | {"D_fc2.weight": randn(IN, 3)}), r"got \[4, 12\], \[12, 3\]"),
        (
            lambda: LinearAdapter(tensors(IN), "after").merged(randn(OUT, IN)),
            r"of width 12 after a weight \[10, 12\]",
        ),
        (lambda: LinearAdapter(tensors(IN)).factors(), "factors need the layer's weight"),
        (
            lambda: LinearAdapter(tensors(IN)).merged(torch.zeros(2, IN, dtype=torch.uint8)),
            "only into a floating",
        ),
        (lambda: shift_heads(randn(5, 2, 12), 4), r"\[batch \* 4, n, C\] required, got \[5, 2, 12\]"),
        (lambda: shift_heads(randn(4, 2, 12), 4, divisor=1), "<= C required, got C = 12, divisor 1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
