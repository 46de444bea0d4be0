import pytest
import torch
from torch import nn

from rfkernels.variants.dit import DiTBlock
from rfkernels.variants.growth import Learngene, expanded_linear, learngene_names
from tests.variants.reference import block, close, forward, randn, randomise

WIDTH = 16


def gene():
    return randomise(Learngene(block()), 1)


def inputs():
    return 0.3 * randn(2, 5, WIDTH, seed=1), randn(2, WIDTH, seed=2)


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_layers_are_affine_in_their_index(depth):
    made = gene()
    base, slope = dict(made.base.named_parameters()), dict(made.slope.named_parameters())
    for i, layer in enumerate(made.expand(depth)):
        for name, p in layer.named_parameters():
            close(p, base[name] + i / depth * slope[name])
            if i == 0:
                assert torch.equal(p, base[name])


@pytest.mark.parametrize("depth", [1, 4])
def test_a_stack_is_its_expansion_and_the_definition(depth):
    made, (x, c) = gene(), inputs()
    y = z = x
    for layer in made.expand(depth):
        y, z = layer(y, c), forward(layer, z, c)
    close(made(x, c, depth=depth), y)
    close(y, z)


def test_buffers_of_a_block_stay_its_own():
    norm = nn.BatchNorm1d(4).double().eval()
    norm.register_buffer("extra", torch.ones(1), persistent=False)
    x = randn(3, 4)
    close(Learngene(norm)(x, depth=2), x / (1 + norm.eps))
    assert len(Learngene(norm).expand(2)) == 2


def test_expanded_blocks_own_their_weights():
    made = gene()
    layers = made.expand(2)
    layers[0].mlp.fc1.weight.data.zero_()
    assert made.base.mlp.fc1.weight.abs().max() > 0 and layers[1].mlp.fc1.weight.abs().max() > 0


def test_depths_share_layers_at_equal_shares():
    made = gene()
    for name, p in made.expand(4)[2].named_parameters():
        close(p, dict(made.expand(6)[3].named_parameters())[name])


def test_training_reaches_both_blocks_by_the_chain_rule():
    made, (x, c) = gene().requires_grad_(True), inputs()
    made(x, c, depth=3).square().sum().backward()
    layers = made.expand(3).requires_grad_(True)
    y = x
    for layer in layers:
        y = layer(y, c)
    y.square().sum().backward()
    for part, weights in ((made.base, (1, 1, 1)), (made.slope, (0, 1 / 3, 2 / 3))):
        grads = [dict(layer.named_parameters()) for layer in layers]
        for name, p in part.named_parameters():
            expected = sum(w * g[name].grad for w, g in zip(weights, grads, strict=True))
            torch.testing.assert_close(p.grad, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_without_its_weight(bias):
    base, slope = (randomise(nn.Linear(7, 5, bias=bias), s) for s in (1, 2))
    x = randn(3, 7)
    y = x @ (base.weight + 0.75 * slope.weight).T
    close(expanded_linear(x, base, slope, 0.75), y + base.bias + 0.75 * slope.bias if bias else y)


def test_beginnings():
    torch.manual_seed(0)
    stack = nn.ModuleDict({"block": DiTBlock(64, 4), "norm": nn.LayerNorm(64)})
    made = Learngene(stack)
    assert (made.base["norm"].weight == 1).all() and (made.slope["norm"].weight == 0).all()
    for part in (made.base, made.slope):
        w = part["block"].mlp.fc1.weight
        assert w.abs().max() <= 0.04 and 0.016 < w.std() < 0.019  # of a normal cut at two deviations: 0.88
    assert not torch.equal(made.base["block"].mlp.fc1.weight, made.slope["block"].mlp.fc1.weight)


def test_names_of_files():
    names = [
        "a.qkv.weight_base",
        "a.qkv.weight_ilayer",
        "a.norm.bias_ilayer",
        "a.norm.bias_base",
        "head.weight",
    ]
    assert learngene_names(names) == {
        "a.qkv.weight": ("a.qkv.weight_base", "a.qkv.weight_ilayer"),
        "a.norm.bias": ("a.norm.bias_base", "a.norm.bias_ilayer"),
    }
    with pytest.raises(ValueError, match=r"got a\.qkv\.weight_base alone"):
        learngene_names(names[:1])


@pytest.mark.parametrize("index, depth", [(3, 3), (-1, 3), (0, 0)])
def test_layers_outside_are_refused(index, depth):
    with pytest.raises(ValueError, match=f"0 .. depth - 1, got {index} of {depth}"):
        gene().layer(index, depth)
