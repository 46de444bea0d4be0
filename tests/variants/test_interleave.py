"""FIT: the interleaved graph, group by group in plain torch, and what it must be the same as."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rfkernels.variants.interleave import FIT, parse_layers
from tests.variants.plain import attend, close, draw, layer_norm, randomise

BATCH, GROUPS, ROWS, LATENTS, WIDTH, WIDE = 2, 3, 5, 2, 12, 18


def fit(layers="(2)1(1)2", latents=LATENTS, seed=0, groups=GROUPS, **options):
    options = {"latent_width": WIDE, "latent_heads": 6} | options
    return randomise(FIT(layers, groups, latents, WIDTH, 3, **options), seed)


X, CONDITION = draw(BATCH, GROUPS * ROWS, WIDTH), draw(BATCH, 4, WIDE, seed=1)
PREVIOUS = draw(BATCH, GROUPS * LATENTS, WIDE, seed=2)


# --- the definition ---


def attention(m, x, source=None):
    n = layer_norm(x, m.norm)
    s = n if source is None else layer_norm(source, m.norm_source)
    k, v = m.kv(s).chunk(2, -1)
    return x + m.out(attend(m.q(n), k, v, m.heads))


def mlp(m, x):
    return m.down(F.gelu(m.up(layer_norm(x, m.norm))))


def layer(m, x):
    x = attention(m.attend, x)
    return x + mlp(m.mlp, x)


def causal_layer(m, z):
    """Group g attends to itself and those before it: only its own rows of the answer are kept."""
    per = LATENTS
    rows = [layer(m, z[:, : per * (g + 1)])[:, per * g :] for g in range(GROUPS)]
    return torch.cat(rows, 1)


def definition(m, layers, x, condition=None, previous=None):
    groups = list(x.chunk(GROUPS, 1))
    z = m.latents.flatten(0, 1).expand(BATCH, -1, -1)
    if m.before:
        previous = torch.zeros_like(z) if previous is None else previous
        z = z + layer_norm(previous + mlp(m.before["mlp"], previous), m.before["norm"])
    numbers = parse_layers(layers)
    for i, ((local, across), stage) in enumerate(zip(numbers, m.stages, strict=True)):
        for j in range(local):
            groups = [layer(stage["local"][j], g) for g in groups]
        if not across:
            continue
        latents = z.chunk(GROUPS, 1)
        z = torch.cat([attention(stage["read"], a, g) for a, g in zip(latents, groups, strict=True)], 1)
        if condition is not None:
            z = attention(stage["condition"], z, condition)
        for j in range(across):
            z = (causal_layer if m.causal else layer)(stage["across"][j], z)
        assert ("write" in stage) == (i + 1 < len(numbers))
        if i + 1 < len(numbers):
            pairs = zip(groups, z.chunk(GROUPS, 1), strict=True)
            groups = [attention(stage["write"], g, a) for g, a in pairs]
    return torch.cat(groups, 1), z


# --- claims ---


@pytest.mark.parametrize(
    "text, stages",
    [
        ("(4)2(4)2", [(4, 2), (4, 2)]),
        ("(2)4(2)", [(2, 4), (2, 0)]),
        ("(12)", [(12, 0)]),
        ("(0)10(1)", [(0, 10), (1, 0)]),
    ],
)
def test_layer_strings(text, stages):
    assert parse_layers(text) == stages


@pytest.mark.parametrize("text", ["", "4", "(4", "2(4)", "(4)2(a)", "(4) 2", "()2", "(-1)2"])
def test_other_strings_are_refused(text):
    with pytest.raises(ValueError, match="required, got"):
        parse_layers(text)


@pytest.mark.parametrize(
    "layers, options, inputs",
    [
        ("(2)1(1)2", {}, {}),
        ("(1)2(1)", {"condition": True}, {"condition": CONDITION}),
        ("(1)1(1)1", {"self_condition": True}, {"previous": PREVIOUS}),
        ("(0)1(1)", {"self_condition": True}, {}),
        ("(1)1(1)2", {"causal": True}, {}),
        ("(1)1(1)", {"latent_width": 6, "latent_heads": 3}, {}),
    ],
)
def test_it_is_its_definition_with_its_gradients(layers, options, inputs):
    m, x = fit(layers, **options), X.clone().requires_grad_()
    ours, theirs = m(x, **inputs), definition(m, layers, x, **inputs)
    weights = [draw(*t.shape, seed=7 + i) for i, t in enumerate(ours)]
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-11)
    leaves = [x, *m.parameters()]
    sums = [sum((t * w).sum() for t, w in zip(pair, weights, strict=True)) for pair in (ours, theirs)]
    for a, b in zip(*(torch.autograd.grad(s, leaves, allow_unused=True) for s in sums), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b, 1e-10)


def test_one_group_without_latents_is_a_transformer():
    """torch's own, with our weights."""
    m = fit("(2)1", latents=0, groups=1)
    x = expected = X
    for ours in m.stages[0]["local"]:
        theirs = nn.TransformerEncoderLayer(
            WIDTH, 3, 4 * WIDTH, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
        ).double()
        a = ours.attend
        state = {"self_attn.in_proj_weight": torch.cat([a.q.weight, a.kv.weight])}
        state["self_attn.in_proj_bias"] = torch.cat([a.q.bias, a.kv.bias])
        pairs = {"self_attn.out_proj": a.out, "norm1": a.norm, "norm2": ours.mlp.norm}
        for name, module in (pairs | {"linear1": ours.mlp.up, "linear2": ours.mlp.down}).items():
            state |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
        theirs.load_state_dict(state)
        expected = theirs(expected)
    out, latents = m(x)
    close(out, expected)
    assert latents.shape == (BATCH, 0, WIDE)


@torch.no_grad()
def test_groups_may_be_permuted():
    m, order = fit(), [2, 0, 1]
    x, z = m(X)
    permuted = lambda t: t.unflatten(1, (GROUPS, -1))[:, order].flatten(1, 2)
    m.latents.copy_(m.latents[order].clone())
    x2, z2 = m(permuted(X))
    close(x2, permuted(x))
    close(z2, permuted(z))


@torch.no_grad()
def test_groups_hear_of_each_other_through_latents_alone():
    """The last group changes: without latents no other does, with causal latents none before it."""
    changed = X.clone()
    changed[:, -1] = draw(WIDTH, seed=8)
    for options, silent in (({"latents": 0}, True), ({"causal": True}, True), ({}, False)):
        m = fit(**options)
        before, after = (m(t)[0][:, :-ROWS] for t in (X, changed))
        assert torch.equal(before, after) if silent else not torch.allclose(before, after)


def test_self_conditioning_begins_as_nothing_and_is_not_trained_through():
    m = FIT("(1)1(1)", GROUPS, LATENTS, WIDTH, 3, latent_width=WIDE, self_condition=True).double()
    previous = PREVIOUS.clone().requires_grad_()
    out = m(X, previous=previous)
    assert all(map(torch.equal, out, m(X)))
    randomise(m)
    m(X, previous=previous)[1].sum().backward()
    assert previous.grad is None and m.before["mlp"].up.weight.grad.abs().max() > 0


def test_refusals():
    for call, message in (
        (lambda: fit(groups=0), "1 group or more and 0 latents or more required, got 0, 2"),
        (lambda: fit(latents=-1), "0 latents or more required, got 3, -1"),
        (lambda: FIT("(1)", 1, 1, WIDTH, 5), "heads must divide the width 12 of an attention, got 5"),
        (lambda: fit()(X, condition=CONDITION), r"no condition required, got \[2, 4, 18\]"),
        (lambda: fit(condition=True)(X), "a condition required, got None"),
        (lambda: fit()(X, previous=PREVIOUS), r"previous latents None required, got \[2, 6, 18\]"),
        (lambda: fit(self_condition=True)(X, previous=PREVIOUS[:1]), r"latents \[2, 6, 18\] required"),
        (lambda: fit()(X[:, 1:]), "3 groups must divide the 14 queries"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
