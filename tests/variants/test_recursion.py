import pytest
import torch
import torch.nn.functional as F

from rfkernels.variants.recursion import (
    ExpertChoice,
    SlicedRecursion,
    TokenChoice,
    balance_loss,
    capacity_at,
    choice_loss,
    layer_order,
    z_loss,
)
from tests.variants.reference import block, close, forward, randn, randomise

WIDTH, TOKENS, BATCH = 16, 8, 2


def inputs():
    return 0.5 * randn(BATCH, TOKENS, WIDTH, seed=1), randn(BATCH, WIDTH, seed=2)


# --- SReT ---


def test_sliced_recursion_is_masks_and_projections():
    model, (x, c) = randomise(SlicedRecursion(block(), (4, 2, 1), 24), 3), inputs()
    token = torch.arange(TOKENS)
    y = forward(model.block, x, c, mask=(token[:, None] // 2 == token // 2))
    for between, slices in zip(model.between, (2, 1), strict=True):
        h = F.layer_norm(y, (WIDTH,), between.norm.weight, between.norm.bias)
        h = F.linear(h, between.mlp.fc1.weight, between.mlp.fc1.bias)
        h = F.linear(F.gelu(h, approximate="tanh"), between.mlp.fc2.weight, between.mlp.fc2.bias)
        y = between.keep * y + between.change * h
        y = forward(model.block, y, c, mask=(token[:, None] % slices == token % slices))
    close(model(x, c), y)


def test_one_application_without_slices_is_the_block():
    b, (x, c) = block(), inputs()
    assert torch.equal(SlicedRecursion(b, [1])(x, c), b(x, c))


def test_inference_does_not_draw_and_weights_are_shared():
    model, (x, c) = SlicedRecursion(block(), [2, 2]).double(), inputs()
    state = torch.get_rng_state()
    assert torch.equal(model(x, c), model(x, c))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.between[0].keep == 1 and model.between[0].change == 1
    qkv = [name for name, _ in model.named_parameters() if name.endswith("qkv.weight")]
    assert qkv == ["block.attn.qkv.weight"]


# --- MoR ---


def test_layer_order():
    assert layer_order("cycle", 3, 2) == [0, 1, 2, 0, 1, 2]
    assert layer_order("sequence", 3, 2) == [0, 0, 1, 1, 2, 2]
    assert layer_order("middle-cycle", 4, 2) == [0, 1, 2, 1, 2, 3]
    assert layer_order("middle-sequence", 4, 2) == [0, 1, 1, 2, 2, 3]


def masked_expert_choice(model, x, c):
    """Full width everywhere: a mask of the active tokens, and of what they see."""
    active = torch.ones(x.shape[:2], dtype=torch.bool)
    first = []
    for step, (router, capacity) in enumerate(zip(model.routers, model.capacities, strict=True)):
        logits = (x @ router.weight[0]).masked_fill(~active, -torch.inf)
        threshold = logits.sort(descending=True).values[:, int(capacity * TOKENS) - 1]
        active = logits >= threshold[:, None]
        y = x
        for i, b in enumerate(model.blocks):
            if step == 0:
                first.append(y)
            if model.share_kv:
                y = forward(b, y, c, kv=first[i])
            else:
                y = forward(b, y, c, mask=active[:, None, None, :])
        gate = model.alpha * logits.sigmoid()[..., None]
        x = torch.where(active[..., None], x + gate * y, x)
    return x, active


@pytest.mark.parametrize("share", [True, False])
def test_expert_choice_is_its_dense_mask(share):
    blocks, (x, c) = [block(seed=0), block(seed=5)], inputs()
    capacities = (1.0, 0.5, 0.25) if share else (0.75, 0.5, 0.25)
    model = randomise(ExpertChoice(blocks, capacities, alpha=0.3, share_kv=share), 4)
    y, routing = model(x, c)
    close(y, masked_expert_choice(model, x, c)[0])
    assert [chosen.index.shape[1] for _, chosen in routing] == [int(s * TOKENS) for s in capacities]


def test_unselected_tokens_keep_their_bits():
    x, c = inputs()
    model = randomise(ExpertChoice([block()], [0.5], share_kv=False), 4)
    y, [(logits, chosen)] = model(x, c)
    out = torch.ones(BATCH, TOKENS).scatter(1, chosen.index, 0).bool()
    assert torch.equal(y[out], x[out]) and (y[~out] != x[~out]).any(-1).all()
    assert logits[out].max(-1).values < logits[~out].max()


def test_capacity_one_and_gate_one_is_plain_recursion():
    b, (x, c) = block(), inputs()
    model = randomise(ExpertChoice([b], [1.0, 1.0], alpha=2.0, share_kv=False), 4)
    for router in model.routers:
        router.weight.zero_()  # gate 2 sigmoid(0) = 1
    y = x + forward(b, x, c)
    close(model(x, c)[0], y + forward(b, y, c))


def test_equal_logits_take_the_first_tokens():
    x, c = inputs()
    model = randomise(ExpertChoice([block()], [0.5], share_kv=False), 4)
    model.routers[0].weight.zero_()
    assert model(x, c)[1][0][1].index.tolist() == [[0, 1, 2, 3]] * BATCH


@pytest.mark.parametrize("room", [None, TOKENS])
@pytest.mark.parametrize("share", [True, False])
def test_token_choice_runs_each_token_its_depth(share, room):
    b, (x, c) = block(), inputs()
    model = randomise(TokenChoice([b], 3, share_kv=share), 6)
    model.router.weight.mul_(3)
    y, logits = model(x, c, room)
    p = (x @ model.router.weight.T).softmax(-1)
    level = p.argmax(-1)
    assert len(level.unique()) == 3
    states = [forward(b, x, c)]
    for i in range(1, 3):
        running, before = level >= i, states[-1]
        how = {"kv": x} if share else {"mask": running[:, None, None, :]}
        states.append(torch.where(running[..., None], forward(b, before, c, **how).nan_to_num(), before))
    close(y, x + p.max(-1).values[..., None] * states[-1])
    close(logits.softmax(-1), p)


def test_depth_of_no_token_costs_nothing_and_hurts_nothing():
    b, (x, c) = block(), inputs()
    model = randomise(TokenChoice([b], 3, share_kv=False), 6)
    model.router.weight.zero_()  # all of depth 1
    close(model(x, c)[0], x + forward(b, x, c) / 3)


def test_losses():
    even = torch.eye(4, dtype=torch.float64).log().clamp(min=-50).repeat(3, 1)[None]
    torch.testing.assert_close(balance_loss(even).item(), 1.0)
    assert balance_loss(even[:, :1]) > 3.9
    close(z_loss(randn(2, 5, 3)), randn(2, 5, 3).exp().sum(-1).log().square().mean())
    assert [round(capacity_at(s, 10, 0.4), 6) for s in (0, 5, 10, 20)] == [1.0, 0.7, 0.4, 0.4]
    x, c = inputs()
    model = ExpertChoice([block()], [1.0, 0.5]).double()
    loss = choice_loss(model(x, c, [1.0, 1.0])[1])
    logits = [r[0] for r in model(x, c, [1.0, 1.0])[1]]
    close(loss, -torch.stack([F.logsigmoid(y).mean() for y in logits]).mean())
    loss = choice_loss(model(x, c)[1])
    loss.backward()
    assert model.routers[1].weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: SlicedRecursion(block(), [2, 0]), "slices per application required, got"),
        (lambda: SlicedRecursion(block(), [3])(*inputs()), "3 groups must divide the 8 queries"),
        (lambda: ExpertChoice([block()], [0.5, 0.25]), "the first 1 where keys and values are shared"),
        (
            lambda: ExpertChoice([block()], [0.5, 0.7], share_kv=False),
            r"rise, required, got \[0.5, 0.7",
        ),
        (lambda: ExpertChoice([block()], []), "one or more capacities"),
        (lambda: ExpertChoice([block()], [1.0]).double()(*inputs(), [1.0, 0.5]), "1 capacities in"),
        (lambda: TokenChoice([], 2), "TokenChoice: one block or more required"),
        (lambda: TokenChoice([block()], 0), "depth must be 1 or more, got 0"),
        (lambda: layer_order("cycles", 3, 2), "required, got 'cycles', 3, 2"),
        (lambda: layer_order("middle-cycle", 2, 2), "more layers than those that run once"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
