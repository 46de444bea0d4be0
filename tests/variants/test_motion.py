"""MotionRAG's adapter before the last layer of an attention, whatever computes it."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import nn

from rfkernels.variants.motion import MotionAdapter
from tests.variants.plain import attend, close, draw, randomise

WIDTH, HEADS, MOTION = 24, 2, 10
X, TEXT, M = draw(2, 7, WIDTH), draw(2, 4, WIDTH, seed=1), draw(2, 3, MOTION, seed=2)


def cogvideox():
    made = Attention(
        WIDTH,
        heads=HEADS,
        dim_head=12,
        qk_norm="layer_norm",
        bias=True,
        processor=CogVideoXAttnProcessor2_0(),
    )
    return randomise(made), lambda a, x=X: torch.cat(a(x, encoder_hidden_states=TEXT[: len(x)]), 1)


def wan():
    return randomise(WanAttention(WIDTH, HEADS, 12, processor=WanAttnProcessor())), lambda a, x=X: a(x)


def wan_cross():
    made = WanAttention(WIDTH, HEADS, 12, cross_attention_dim_head=12, processor=WanAttnProcessor())
    return randomise(made), lambda a, x=X: a(x, TEXT[: len(x)])


kinds = pytest.mark.parametrize("kind", [cogvideox, wan, wan_cross])


def adapted(attention, motion=M, **options):
    adapter = randomise(MotionAdapter([attention], MOTION), 5)
    adapter.attach()
    adapter.condition(motion)
    return adapter


def expectation(attention, run, layer, motion, scale=1.0):
    """What the attention gives of o + scale attention(Wq o, Wk m, Wv m), o caught on its way."""
    caught = []
    handle = attention.to_out[0].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    run(attention)
    handle.remove()
    (o,) = caught
    q, k, v = o @ layer.to_q_ip.weight.T, motion @ layer.to_k_ip.weight.T, motion @ layer.to_v_ip.weight.T
    out = attention.to_out[0](o + scale * attend(q, k, v, HEADS))
    if attention.processor.__class__ is CogVideoXAttnProcessor2_0:  # text stands first in o, last in `run`
        out = torch.cat([out[:, TEXT.shape[1] :], out[:, : TEXT.shape[1]]], 1)
    return out


@kinds
@torch.no_grad()
def test_it_is_nothing_at_first_and_after_detaching(kind):
    attention, run = kind()
    base, state = run(attention), list(attention.state_dict())
    adapter = MotionAdapter([attention], MOTION).double()
    adapter.attach()
    assert torch.equal(run(attention), base)  # no condition
    adapter.condition(M)
    assert torch.equal(run(attention), base)
    randomise(adapter)
    adapter.condition(M)
    assert not torch.allclose(run(attention), base, atol=1e-3)
    adapter.scale = 0
    assert torch.equal(run(attention), base)
    adapter.scale = 1.0
    adapter.detach()
    assert torch.equal(run(attention), base) and list(attention.state_dict()) == state
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in attention.modules())


@kinds
@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 0.3, torch.tensor(-0.5)])
def test_it_adds_a_second_attention_before_the_last_layer(kind, scale):
    attention, run = kind()
    adapter = adapted(attention)
    adapter.detach()
    expected = expectation(attention, run, adapter.layers[0], M, float(scale))
    adapter.attach()
    adapter.attach()  # once
    adapter.scale = scale
    close(run(attention), expected, 1e-11 if isinstance(scale, float) else 1e-7)  # a float32 scale


@torch.no_grad()
def test_keys_are_made_once_per_condition():
    attention, run = wan()
    adapter, calls = adapted(attention), []
    made = adapter.layers[0].keys
    adapter.layers[0].keys = lambda motion: calls.append(1) or made(motion)
    adapter.condition(M)
    first = [run(attention) for _ in range(3)][-1]
    assert len(calls) == 1
    adapter.condition(2 * M)
    assert len(calls) == 2 and not torch.allclose(run(attention), first)
    adapter.condition(None)
    adapter.detach()
    base = run(attention)
    adapter.attach()
    assert torch.equal(run(attention), base)


@torch.no_grad()
def test_frames_of_a_sample_share_its_motion():
    attention, run = wan()
    adapter = adapted(attention)
    x = draw(6, 7, WIDTH, seed=3)
    together = run(attention, x)
    for i in range(2):
        adapter.condition(M[i : i + 1])
        close(run(attention, x[3 * i : 3 * i + 3]), together[3 * i : 3 * i + 3])


@torch.no_grad()
def test_layers_belong_to_their_attentions():
    attentions = nn.ModuleList(wan()[0] for _ in range(2))
    adapter = randomise(MotionAdapter(attentions, MOTION))
    assert [name for name, _ in adapter.named_parameters()] == [
        f"layers.{i}.to_{n}_ip.weight" for i in range(2) for n in "qkv"
    ]
    expected = [expectation(a, lambda a: a(X), m, M) for a, m in zip(attentions, adapter.layers, strict=True)]
    adapter.attach()
    adapter.condition(M)
    for a, e in zip(attentions, expected, strict=True):
        close(a(X), e)
    assert not torch.allclose(*expected)


def test_it_trains():
    attention, run = cogvideox()
    adapter = adapted(attention)
    run(attention).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters())


@torch.no_grad()
def test_16_bits():
    attention = wan()[0].bfloat16()
    adapter = MotionAdapter([attention], MOTION)
    nn.init.ones_(adapter.layers[0].to_v_ip.weight)
    adapter.attach()
    adapter.condition(M)
    for scale in (0.5, torch.tensor(0.5)):
        adapter.scale = scale
        assert attention(X.bfloat16()).dtype == torch.bfloat16


def test_refusals():
    attention, run = wan()
    with pytest.raises(ValueError, match="attention modules with heads and to_out required, got Linear"):
        MotionAdapter([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="required, got none"):
        MotionAdapter([])
    adapter = adapted(attention)
    with pytest.raises(ValueError, match=r"motion must be \[batch, tokens, motion_width\], got \[3, 10\]"):
        adapter.condition(M[0])
    adapter.condition(M)
    with pytest.raises(ValueError, match="2 conditions must divide the batch, got 3"):
        run(attention, draw(3, 7, WIDTH))
