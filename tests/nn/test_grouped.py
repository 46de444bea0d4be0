"""Attention inside groups of tokens: what it must equal, and that nothing is copied on the way."""

import pytest
import torch

from rfkernels import ops
from rfkernels.nn import grouped, local_attention, sliced_attention, zero_i2v_head_shift

F64 = torch.float64
BATCH, HEADS, GROUPS, D = 2, 4, 3, 8


def draw(tokens, heads=HEADS, layout="bhld", seed=0, batch=BATCH):
    """Tokens of a layout, as a view of [batch, heads, tokens, d] too: the values do not depend on it."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(batch, heads, tokens, D, generator=generator, dtype=F64)
    return t if layout == "bhld" else t.transpose(1, 2).contiguous()


def first(t, layout):
    """The layout bhld of a result."""
    return t if layout == "bhld" else t.transpose(1, 2)


def masked(q, k, v, seen, **options):
    """Attention where `seen` [rows, keys], all of bhld."""
    return ops.attention(q, k, v, bias=seen[None, None], **options)


layouts = pytest.mark.parametrize("layout", ["bhld", "blhd"])
memories = pytest.mark.parametrize("strided", [False, True])  # queries through other strides
kv = pytest.mark.parametrize("kv_heads", [4, 2])


@kv
@memories
@layouts
@pytest.mark.parametrize("rows, keys", [(5, 5), (1, 7), (7, 2)])
def test_local_attention_is_a_block_diagonal_mask(rows, keys, layout, strided, kv_heads):
    """With as many queries as keys a local layer of FIT, with few queries latents that read, with few keys
    tokens that latents write to."""
    sizes = ((GROUPS * rows, HEADS), (GROUPS * keys, kv_heads), (GROUPS * keys, kv_heads))
    q, k, v = (draw(n, heads, layout, seed) for seed, (n, heads) in enumerate(sizes))
    if strided:
        q, k, v = (torch.stack([t, t], -2)[..., 0, :] for t in (q, k, v))
    out = local_attention(q, k, v, GROUPS, layout=layout, scale=0.7)
    of = lambda n: torch.arange(GROUPS).repeat_interleave(n)
    seen = of(rows)[:, None] == of(keys)
    expected = masked(*(first(t, layout) for t in (q, k, v)), seen, scale=0.7)
    torch.testing.assert_close(first(out, layout), expected, rtol=1e-12, atol=1e-12)


@layouts
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_sliced_attention_is_a_mask_of_equal_remainders(groups, layout):
    q, k, v = (draw(12, HEADS, layout, seed) for seed in range(3))
    out = sliced_attention(q, k, v, groups, layout=layout, scale=0.7)
    i = torch.arange(12)
    seen = i[:, None] % groups == i % groups
    expected = masked(*(first(t, layout) for t in (q, k, v)), seen, scale=0.7)
    torch.testing.assert_close(first(out, layout), expected, rtol=1e-12, atol=1e-12)
    near = sliced_attention(q, k, v, groups, strided=False, layout=layout, scale=0.7)
    assert torch.equal(near, local_attention(q, k, v, groups, layout=layout, scale=0.7))


@layouts
@pytest.mark.parametrize("attend", [local_attention, sliced_attention])
def test_one_group_is_plain_attention(attend, layout):
    q, k, v = (draw(6, HEADS, layout, seed) for seed in range(3))
    torch.testing.assert_close(attend(q, k, v, 1, layout=layout), ops.attention(q, k, v, layout=layout))


def test_groups_may_change_places():
    """Local attention does not know where a group lies."""
    order = torch.tensor([2, 0, 1])
    moved = lambda t: t.unflatten(2, (GROUPS, -1))[:, :, order].flatten(2, 3)
    q, k, v = (draw(GROUPS * 4, seed=seed) for seed in range(3))
    ours = local_attention(*map(moved, (q, k, v)), GROUPS)
    torch.testing.assert_close(ours, moved(local_attention(q, k, v, GROUPS)), rtol=1e-13, atol=1e-13)


def test_no_latents_read_nothing_and_write_nothing():
    data, none = draw(GROUPS * 4), draw(0)
    assert local_attention(none, data, data, GROUPS).shape == (BATCH, HEADS, 0, D)
    assert local_attention(data, none, none, GROUPS).eq(0).all()


@pytest.mark.parametrize(
    "attend, layout, projected",
    [
        (local_attention, "bhld", False),
        (local_attention, "bhld", True),
        (local_attention, "blhd", False),
        (sliced_attention, "bhld", False),
        (sliced_attention, "blhd", False),
    ],
)
def test_queries_keys_and_values_are_not_copied(attend, layout, projected, monkeypatch):
    tokens = [draw(12, HEADS, "blhd" if projected else layout, seed) for seed in range(3)]
    memory = [t.untyped_storage().data_ptr() for t in tokens]
    tokens = [t.transpose(1, 2) for t in tokens] if projected else tokens
    seen, real = [], grouped.attention

    def noted(*args, **options):
        seen.append([t.untyped_storage().data_ptr() for t in args])
        return real(*args, **options)

    monkeypatch.setattr(grouped, "attention", noted)
    attend(*tokens, GROUPS, layout=layout)
    assert len(seen) == (1 if attend is local_attention else GROUPS)
    assert all(pointers == memory for pointers in seen)


@pytest.mark.parametrize("attend", [local_attention, sliced_attention])
def test_gradient_is_that_of_the_mask(attend):
    q, k, v = inputs = [draw(6, seed=seed).requires_grad_() for seed in range(3)]
    group = torch.arange(6) // 2 if attend is local_attention else torch.arange(6) % 3
    grad = draw(6, seed=4)
    ours = torch.autograd.grad(attend(q, k, v, 3), inputs, grad)
    theirs = torch.autograd.grad(masked(q, k, v, group[:, None] == group), inputs, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attend", [local_attention, sliced_attention])
def test_groups_compile_without_a_break(attend):
    q, k, v = (draw(6, seed=seed) for seed in range(3))
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, 3), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v, 3), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("attend", [local_attention, sliced_attention])
def test_tokens_that_groups_do_not_divide_are_refused(attend):
    q, k = draw(6), draw(8)
    with pytest.raises(ValueError, match="4 groups must divide the 6 queries and 8 keys"):
        attend(q, k, k, 4)
    with pytest.raises(ValueError, match="3 groups must divide the 6 queries and 8 keys"):
        attend(q, k, k, 3)
    with pytest.raises(ValueError, match="0 groups"):
        attend(q, k, k, 0)
    with pytest.raises(ValueError, match="expected four axes, bhld or blhd"):
        attend(q[0], k, k, 2)
    with pytest.raises(ValueError, match="'lbhd'"):
        attend(q, k, k, 2, layout="lbhd")
    with pytest.raises(ValueError, match="attention: precision must be one of"):
        attend(q, k, k, 2, precision="int7")


def test_head_shift_of_zero_i2v():
    assert zero_i2v_head_shift(12).tolist() == [-1, 1] + [0] * 10
    assert zero_i2v_head_shift(16, 4).tolist() == [-1] * 4 + [1] * 4 + [0] * 8
    for wrong in ((12, 1), (12, 5)):
        with pytest.raises(ValueError, match="div must divide the heads and be 2 or more"):
            zero_i2v_head_shift(*wrong)


def test_shifted_heads_see_the_frames_beside_theirs():
    """The card's form: keys and values of the first heads moved along the frames, those at an end kept."""
    frames = 3
    q, k, v = (draw(5, 12, seed=seed, batch=2 * frames) for seed in range(3))

    def moved(t):
        clips, result = t.unflatten(0, (-1, frames)), t.unflatten(0, (-1, frames)).clone()
        result[:, 1:, 0] = clips[:, :-1, 0]  # from frame t - 1
        result[:, :-1, 1] = clips[:, 1:, 1]  # from frame t + 1
        return result.flatten(0, 1)

    ours = ops.attention(q, k, v, head_shift=zero_i2v_head_shift(12), frames=frames)
    torch.testing.assert_close(ours, ops.attention(q, moved(k), moved(v)), rtol=1e-13, atol=1e-13)
