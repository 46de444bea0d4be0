"""Attention over a moving window, token by token, against the window computed anew."""

import pytest
import torch

from rfkernels import ops
from rfkernels.nn import ContinualAttention, KeyValueWindow

F64 = torch.float64


def stream(*shape, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def exact(q, k, v, scale=None):
    return ops.attention(q.double(), k.double(), v.double(), scale=scale)


@pytest.mark.parametrize("steps", [(1,) * 20, (3, 5, 2, 4, 1, 6), (7,) * 3, (20,), (9, 1, 8)], ids=str)
def test_window_attends_to_the_last_tokens(steps):
    window, k, v = KeyValueWindow(7), stream(2, 2, 21, 8), stream(2, 2, 21, 8, seed=1)
    q, seen = stream(2, 4, 3, 8, seed=2), 0
    for count in steps:
        window.append(k[:, :, seen : seen + count], v[:, :, seen : seen + count])
        seen += count
        out, lse = window.attend(q, return_lse=True)
        recent = slice(max(0, seen - 7), seen)
        expected = ops.attention(q, k[:, :, recent], v[:, :, recent], return_lse=True)
        torch.testing.assert_close((out, lse), expected, rtol=1e-13, atol=1e-13)
        assert len(window) == min(seen, 7)


def test_window_takes_the_options_of_attention():
    window, k, v, q = KeyValueWindow(4), stream(1, 2, 3, 8), stream(1, 2, 3, 8, seed=1), stream(1, 5, 2, 8)
    window.append(k, v)
    expected = ops.attention(q.transpose(1, 2), k, v, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(window.attend(q, scale=0.3, layout="blhd"), expected)
    with pytest.raises(ValueError, match="keys lie in no order, got bias, head_shift"):
        window.attend(q, head_shift=None, bias=torch.zeros(1, 1, 1, 4))
    with pytest.raises(ValueError, match="layout"):
        window.attend(q, layout="hbld")


def test_window_forgets_and_takes_other_tokens():
    window = KeyValueWindow(3)
    window.append(stream(1, 1, 5, 8), stream(1, 1, 5, 8))
    window.reset()
    assert len(window) == 0 and not window.state_dict()
    with pytest.raises(ValueError, match="before queries, got none"):
        window.attend(stream(1, 1, 1, 8))
    k = stream(2, 1, 1, 16, dtype=torch.bfloat16)
    window.append(k, k)
    assert torch.equal(window.attend(stream(2, 1, 1, 16, dtype=torch.bfloat16)), k)


def test_window_keeps_its_memory_and_no_graph():
    window, token = KeyValueWindow(3), stream(1, 1, 1, 8).requires_grad_()
    with torch.inference_mode():
        window.append(token, token)
    memory = window.keys.data_ptr()
    for _ in range(5):
        window.append(token, token)  # outside of inference mode too
    q = stream(1, 1, 1, 8).requires_grad_()
    out = window.attend(q)
    assert window.keys.data_ptr() == memory and not window.keys.requires_grad
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.shape == q.shape
    with torch.inference_mode():
        assert torch.equal(window.attend(q), out)


def test_window_refuses_other_tokens():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        KeyValueWindow(0)
    window, k = KeyValueWindow(3), stream(2, 4, 1, 8)
    for wrong in (k[0], k[:, :2], k.float()):
        with pytest.raises(ValueError, match="of one dtype, got"):
            window.append(k, wrong)
    window.append(k, k)
    for wrong in (k[:1], k[:, :2], k[..., :4], k.float()):
        with pytest.raises(ValueError, match=r"must be \[2, 4, tokens, 8\] torch.float64 as those before"):
            window.append(wrong, wrong)
    assert len(window) == 1


def steps_and_windows(attend, window, q, k, v, scale=None):
    """What every step gives, and the same from the tokens of its window."""
    for t in range(q.shape[2]):
        now, recent = slice(t, t + 1), slice(max(0, t + 1 - window), t + 1)
        yield (
            attend(q[:, :, now], k[:, :, now], v[:, :, now]),
            exact(q[:, :, recent], k[:, :, recent], v[:, :, recent], scale),
        )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [1, 2, 9])
def test_steps_give_what_the_window_gives(window, kv_heads):
    length = 3 * window + 2
    q, k, v = (
        stream(2, 4, length, 8),
        stream(2, kv_heads, length, 8, seed=1),
        stream(2, kv_heads, length, 8, seed=2),
    )
    attend = ContinualAttention(window, scale=0.9)
    for ours, expected in steps_and_windows(attend, window, 2 * q, k, v, 0.9):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rise", [0.0, 20.0])
def test_sums_are_kept_between_steps_and_made_anew_after_a_window(monkeypatch, rise):
    """Also where every new score is far above those before."""
    made, window = [], 6
    attend = ContinualAttention(window)
    real = KeyValueWindow.attend
    monkeypatch.setattr(
        KeyValueWindow, "attend", lambda self, q, **o: made.append(q.shape[2]) or real(self, q, **o)
    )
    k = 0.1 * stream(1, 1, 3 * window, 8)
    k[..., 0] += rise * torch.arange(3 * window)
    q = torch.ones_like(k)
    for _ in steps_and_windows(attend, window, q, k, k):
        pass
    assert made == ([1] * window + [window]) * 3  # one row a step; all of them once a window


@pytest.mark.parametrize("size", [30.0, 1e3, 1e6])
def test_large_scores_neither_overflow_nor_lose_digits(size):
    """Keys of very different length: a sum may lose what made it up when the largest leaves."""
    window, length = 8, 40
    q, k, v = (stream(1, 2, length, 4, seed=s) for s in range(3))
    k[:, :, ::5] *= size
    q[:, :, ::3] *= -3
    attend = ContinualAttention(window, scale=1.0)
    for ours, expected in steps_and_windows(attend, window, q, k, v, 1.0):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_what_is_no_number_leaves_with_its_token(which, junk):
    window = 4
    tokens = {name: stream(1, 1, 12, 4, seed=s) for s, name in enumerate("qkv")}
    tokens[which][0, 0, 5, 1] = junk
    attend = ContinualAttention(window)
    for t, (ours, expected) in enumerate(steps_and_windows(attend, window, *tokens.values())):
        if 5 <= t < 5 + window:
            assert not ours.isfinite().all()
        else:
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_results_have_the_dtype_of_the_query_and_no_gradient():
    attend, token = ContinualAttention(3), stream(1, 2, 1, 8, dtype=torch.bfloat16).requires_grad_()
    with torch.inference_mode():
        attend(token, token, token)
    out = attend(token, token, token)
    assert out.dtype == torch.bfloat16 and out.shape == (1, 2, 2, 8) and not out.requires_grad
    assert torch.equal(out[:, :, 1:], token.detach())
    attend.reset()
    assert attend(token[:, :1], token[:, :1], token[:, :1]).shape == (1, 1, 1, 8)


def test_steps_refuse_other_tokens_and_go_on():
    attend, reference, token = ContinualAttention(2), ContinualAttention(2), stream(1, 4, 1, 8)
    with pytest.raises(ValueError, match=r"must be \[batch, heads, 1, d\], got \(4, 1, 8\)"):
        attend(token[0], token, token)
    with pytest.raises(ValueError, match="one token like those before, got"):
        attend(stream(1, 4, 2, 8), token, token)
    with pytest.raises(ValueError, match=r"kv_heads a divisor of 4, got \(1, 3, 1, 8\)"):
        attend(token, token[:, :3], token[:, :3])
    for t in range(3):
        for wrong in ((token[..., :4], token, token), (token, token, token[:, :2])):
            if t:
                with pytest.raises(ValueError, match="ContinualAttention"):
                    attend(*wrong)
        new = stream(1, 4, 1, 8, seed=t)
        assert torch.equal(attend(new, token, new), reference(new, token, new))


def test_steps_refuse_other_heads():
    attend, token = ContinualAttention(2), stream(1, 4, 1, 8)
    attend(token, token, token)
    with pytest.raises(ValueError, match=r"k and v must be \[1, kv_heads, 1, 8\] like those before"):
        attend(token, token[:, :2], token[:, :2])
