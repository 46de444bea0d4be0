"""Vivid-VR's connectors: nothing at first, the card's formula then, in the blocks of CogVideoX."""

import pytest
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from torch import nn

from rfkernels.variants.connector import Connector, Connectors, control_index
from tests.variants.plain import attend, close, draw, layer_norm, randomise

WIDTH, HEADS = 24, 6


def made(seed=3):
    return randomise(Connector(WIDTH, HEADS, hidden=10), seed)


def definition(m, h, c):
    """The formula, by the released parameters."""
    linear = nn.functional.linear
    pair = lambda p, x: linear(nn.functional.silu(linear(x, p[0].weight, p[0].bias)), p[2].weight, p[2].bias)
    heads = lambda x, norm: layer_norm(x.unflatten(-1, (HEADS, -1)), norm).flatten(2)
    q, k = heads(pair(m.to_q, h), m.norm_q), heads(pair(m.to_k, c), m.norm_k)
    return h + pair(m.out_layer, attend(q, k, c, HEADS)) + pair(m.c_mlp, c)


def test_h_comes_back_to_the_bit_at_first():
    h, c = draw(2, 7, WIDTH), draw(2, 7, WIDTH, seed=1)
    assert torch.equal(Connector(WIDTH, HEADS).double()(h, c), h)


def test_it_is_its_definition_with_its_gradients():
    m, h, c = made(), draw(2, 7, WIDTH).requires_grad_(), draw(2, 7, WIDTH, seed=1).requires_grad_()
    out, expected = m(h, c), definition(m, h, c)
    close(out, expected)
    leaves = [h, c, *m.parameters()]
    weight = draw(2, 7, WIDTH, seed=2)
    for ours, theirs in zip(
        torch.autograd.grad((out * weight).sum(), leaves),
        torch.autograd.grad((expected * weight).sum(), leaves),
        strict=True,
    ):
        close(ours, theirs, 1e-11)


def test_parameters_have_the_released_names():
    host = nn.Module()
    host.connectors = Connectors(2, 96)
    names = set(host.state_dict())
    pairs = {f"{pair}.{i}" for pair in ("to_q", "to_k", "out_layer", "c_mlp") for i in (0, 2)}
    layers = pairs | {"norm_q", "norm_k"}
    assert names == {
        f"connectors.{i}.{layer}.{p}" for i in range(2) for layer in layers for p in ("weight", "bias")
    }
    first = host.connectors[0]
    assert first.to_q[0].weight.shape == (512, 96) and first.norm_q.weight.shape == (2,)


@pytest.mark.parametrize("blocks, controls", [(42, 6), (6, 6), (7, 3), (5, 4), (4, 9)])
def test_blocks_share_features_in_runs(blocks, controls):
    run = -(-blocks // controls)  # ceil
    expected = [i for i in range(controls) for _ in range(run)][:blocks]
    assert [control_index(i, blocks, controls) for i in range(blocks)] == expected


@torch.no_grad()
def test_connectors_stand_behind_the_blocks_of_cogvideox():
    blocks = nn.ModuleList(CogVideoXBlock(WIDTH, 2, 12, 16) for _ in range(3))
    randomise(blocks)
    h, text, temb = draw(1, 8, WIDTH), draw(1, 4, WIDTH, seed=1), draw(1, 16, seed=2)
    controls = [draw(1, 8, WIDTH, seed=7), draw(1, 8, WIDTH, seed=8)]

    def run(between=lambda i, h: h):
        x, y = h, text
        for i, block in enumerate(blocks):
            x, y = block(x, y, temb)
            x = between(i, x)
        return x, y

    base = run()
    connectors = randomise(Connectors(3, WIDTH, HEADS, hidden=10))
    expected = run(lambda i, x: definition(connectors[i], x, controls[[0, 0, 1][i]]))
    connectors.attach(blocks)
    assert all(map(torch.equal, run(), base))  # no controls
    connectors.controls = controls
    for ours, theirs in zip(run(), expected, strict=True):
        close(ours, theirs, 1e-10)
    with pytest.raises(ValueError, match="free connectors required, got 3, attached"):
        connectors.attach(blocks)
    connectors.detach()
    assert all(map(torch.equal, run(), base))
    with pytest.raises(ValueError, match="3 blocks, free connectors required, got 2"):
        connectors.attach(blocks[:2])


def test_blocks_that_return_a_tensor():
    layer = nn.Linear(WIDTH, WIDTH).double()
    connectors = randomise(Connectors(1, WIDTH, HEADS))
    x, c = draw(1, 5, WIDTH), draw(1, 5, WIDTH, seed=1)
    expected = connectors[0](layer(x), c)
    connectors.attach([layer])
    connectors.controls = [c]
    close(layer(x), expected)


def test_refusals():
    with pytest.raises(ValueError, match="heads must divide the width 24, got 48"):
        Connector(WIDTH)
    with pytest.raises(ValueError, match=r"c must be like h \[1, 5, 24\], got \[1, 4, 24\]"):
        made()(draw(1, 5, WIDTH), draw(1, 4, WIDTH))
    for block, controls in ((3, 1), (-1, 1), (0, 0)):
        with pytest.raises(ValueError, match=r"block must be in 0..2 and controls 1 or more"):
            control_index(block, 3, controls)
