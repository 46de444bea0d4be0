import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rfkernels.variants.exits import (
    ExitGate,
    SkipAdapter,
    SkippedStack,
    SkipScores,
    exit_labels,
    exit_loss,
    run_to_exit,
)
from tests.variants.reference import block, close, randn, randomise

WIDTH, TOKENS, BATCH = 16, 5, 6
BLOCKS = [block(seed=i) for i in range(4)]


def inputs():
    return randn(BATCH, TOKENS, WIDTH, seed=1), randn(BATCH, WIDTH, seed=2)


def after(x, c, blocks):
    for b in blocks:
        x = b(x, c)
    return x


# --- exits ---


def test_labels_are_the_best_exit_at_a_price():
    quality = randn(50, 5, seed=3)
    assert torch.equal(exit_labels(quality, 0.0), quality.argmax(1))
    assert not exit_labels(quality, 1e6).any()
    by_hand = [max(range(5), key=lambda k: (q[k] - 0.3 * k, -k)) for q in quality.tolist()]
    assert exit_labels(quality, 0.3).tolist() == by_hand
    last = exit_labels(quality, 0.0)
    for beta in (0.1, 0.2, 0.5, 1.0, 3.0):
        assert (exit_labels(quality, beta) <= last).all()
        last = exit_labels(quality, beta)


def test_of_equal_exits_the_first():
    assert exit_labels(torch.ones(2, 4), 0.0).tolist() == [0, 0]


def test_a_gate_learns_its_labels():
    torch.manual_seed(0)
    x, c = randn(40, TOKENS, WIDTH, seed=1), randn(40, WIDTH, seed=2)
    labels = (x.mean(1)[:, 0] > 0).long() + (c[:, 0] > 0).long()  # tokens and conditioning both matter
    gate = ExitGate(WIDTH, 3).double()
    close(gate(x, c), F.linear(torch.cat([x.mean(1), c], 1), gate.net.weight, gate.net.bias))
    for _ in range(100):
        gate.zero_grad()
        gate.loss(x, c, labels).backward()
        for p in gate.parameters():
            p.data -= 2 * p.grad
    assert (gate(x, c).argmax(1) == labels).double().mean() > 0.9


def test_samples_leave_at_their_exit():
    x, c = inputs()
    choice, exits = torch.tensor([2, 0, 1, 2, 0, 1]), (0, 2, 4)
    y = run_to_exit(BLOCKS, x, c, choice, exits)
    for i, k in enumerate(choice.tolist()):
        close(y[i], after(x[i : i + 1], c[i : i + 1], BLOCKS[: exits[k]])[0])


def test_blocks_run_for_the_samples_that_stay():
    x, c = inputs()
    rows = []
    counted = [lambda x, c, i=i: rows.append((i, len(x))) or BLOCKS[i](x, c) for i in range(4)]
    run_to_exit(counted, x, c, torch.tensor([0, 0, 1, 0, 0, 1]), (1, 3))
    assert rows == [(0, 6), (1, 2), (2, 2)]


def test_losses_of_exits_are_weighted():
    assert exit_loss([torch.tensor(1.0), torch.tensor(2.0)], [0.5, 2.0]) == 4.5


# --- skipping ---


def test_constant_rewards_change_nothing():
    scores = SkipScores(6)
    scores.z += randn(6)
    before = scores.z.clone()
    scores.update([torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([1, 5])], [0.7] * 3)
    close(scores.z, before)


def test_update_is_its_formula():
    scores = SkipScores(4, rate=0.1)
    scores.z += randn(4)
    z, p = scores.z.clone(), randn(4).sigmoid()
    r = torch.tensor([-0.2, -1.0], dtype=torch.float64).exp()
    scores.update([torch.tensor([0, 2]), torch.tensor([2, 3])], [0.2, 1.0])
    for modules, gain in (([0, 2], r[0] - r.mean()), ([2, 3], r[1] - r.mean())):
        for m in modules:
            z[m] += 0.1 * gain * p[m] * (1 - p[m])
    close(scores.z, z)


def test_search_finds_the_modules_that_do_not_matter():
    generator, scores = torch.Generator().manual_seed(0), SkipScores(8, rate=1.0)
    needed = torch.tensor([1, 1, 0, 1, 1, 0, 1, 0], dtype=torch.float64)
    for _ in range(300):
        sets = [scores.sample(3, generator) for _ in range(4)]
        assert all(len(set(s.tolist())) == 3 for s in sets)
        scores.update(sets, [needed[s].sum().item() for s in sets])
    assert scores.mask(3).tolist() == needed.bool().tolist()


def test_adapters_begin_as_identity_and_leave_out_the_extra_norm():
    x, _ = inputs()
    fresh = SkipAdapter(WIDTH, 4).double()
    assert torch.equal(fresh(x), x)
    a = randomise(SkipAdapter(WIDTH, 4), 1)
    y = F.layer_norm(x, (WIDTH,), a.norm.weight, a.norm.bias)
    change = F.linear(F.relu(F.linear(y, a.down.weight, a.down.bias)), a.up.weight, a.up.bias)
    close(a(x), x + change)
    a.compat = True
    close(a(x), x + y + change)


def test_a_stack_that_keeps_all_is_the_model():
    x, c = inputs()
    stack = SkippedStack(BLOCKS, torch.ones(1, 4, dtype=torch.bool))
    assert torch.equal(stack(x, c, 0.3), after(x, c, BLOCKS))


def test_a_stack_skips_by_interval():
    x, c = inputs()
    adapters = [None, randomise(SkipAdapter(WIDTH, 4), 1), None, nn.Identity()]
    keep = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0]]).bool()
    stack = SkippedStack(BLOCKS, keep, (0.0, 0.5, 1.0), adapters)
    early = after(adapters[1](BLOCKS[0](x, c)), c, BLOCKS[2:])
    late = after(x, c, BLOCKS[:3])
    for t, expected in ((0.0, early), (0.49, early), (0.5, late), (1.0, late)):
        close(stack(x, c, t), expected)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: exit_labels(randn(2, 3), -1.0), "beta >= 0 required, got beta -1.0"),
        (lambda: exit_labels(randn(2, 3) * torch.nan, 1.0), "finite quality"),
        (lambda: run_to_exit(BLOCKS, *inputs(), torch.zeros(6).long(), (2, 1)), "exits rising within 0 .. 4"),
        (lambda: run_to_exit(BLOCKS, *inputs(), torch.zeros(6).long() + 2, (1, 5)), "exits rising"),
        (lambda: run_to_exit(BLOCKS, *inputs(), torch.zeros(5).long(), (1, 2)), "each of 6 samples"),
        (lambda: run_to_exit(BLOCKS, *inputs(), torch.zeros(6).long() - 1, (1, 2)), "an index of one"),
        (lambda: exit_loss([randn(1)], [1.0, 2.0]), "each of 1 losses required, got 2"),
        (lambda: SkipScores(3).sample(4), "1 .. 3 modules can be skipped, got 4"),
        (lambda: SkipScores(3).update([torch.tensor([0])], [float("nan")]), "a finite loss"),
        (lambda: SkippedStack(BLOCKS, torch.ones(1, 3).bool()), r"keep bool\[1, 4\]"),
        (lambda: SkippedStack(BLOCKS, torch.ones(2, 4).bool(), (0, 1, 1)), "rising bounds required"),
        (
            lambda: SkippedStack(BLOCKS, torch.ones(1, 4).bool(), adapters=[None]),
            "4 adapters required, got 1",
        ),
        (lambda: SkippedStack(BLOCKS, torch.ones(1, 4).bool())(*inputs(), 1.5), "t must lie in 0.0 .. 1.0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
