import pytest
import torch

from rfkernels.adapters.bottleneck import Bottleneck, BottleneckStack
from rfkernels.adapters.ensemble import Arena, MomentumPair, max_ensemble, merge_earlier, retrieve
from rfkernels.adapters.lora import LoRA
from tests.adapters.layers import close, layer, randn

OUT, IN, RANK = 10, 12, 3


def lora(seed=0):
    return LoRA(
        {"lora_A.weight": randn(RANK, IN, seed=seed), "lora_B.weight": randn(OUT, RANK, seed=seed + 1)}
    )


def test_momentum_has_its_closed_form():
    """theta_off = beta^T theta_0 + (1 - beta^T) theta after T steps at a constant theta."""
    one, two = lora(), lora(seed=5)
    pair = MomentumPair(one, two, beta=0.9)
    start = pair.offline_arena.flat.clone()
    with torch.no_grad():
        for p in (*one.parameters(), *two.parameters()):
            p.add_(1.0)
    for _ in range(20):
        pair.update()
    close(pair.offline_arena.flat, 0.9**20 * start + (1 - 0.9**20) * (start + 1))
    for online, offline in zip(pair.online, pair.offline, strict=True):
        for p, q in zip(online.parameters(), offline.parameters(), strict=True):
            close(p - q, torch.full_like(p, 0.9**20))


def test_online_adapters_train_in_the_arena():
    adapter, base, x = lora().requires_grad_(), layer(OUT, IN), randn(7, IN)
    pair = MomentumPair(adapter, beta=0.5)
    before, offline = adapter(x, base).detach(), pair.offline[0](x, base)
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
    adapter(x, base).square().sum().backward()
    optimiser.step()
    assert not torch.equal(adapter(x, base), before)
    close(pair.offline[0](x, base), offline)
    assert not any(p.requires_grad for p in pair.offline[0].parameters())
    close(torch.cat([p.reshape(-1) for p in adapter.parameters()]), pair.online_arena.flat)
    pair.update()
    close(
        pair.offline_arena.flat * 2 - pair.online_arena.flat,
        torch.cat([p.reshape(-1) for p in lora().parameters()]),
    )


def test_both_adapters_run_as_one_doubled_batch():
    base, x = layer(IN, IN), randn(2, 7, IN)
    made = {"down_proj.weight": randn(RANK, IN), "up_proj.weight": randn(IN, RANK)}
    pair = MomentumPair(Bottleneck(made), beta=0.9)
    with torch.no_grad():
        pair.online_arena.flat.add_(1.0)
    both = [pair.online[0], pair.offline[0]]
    hidden, up, _ = BottleneckStack(both).branch(torch.cat([x, x]), torch.tensor([0, 0, 1, 1]))
    y = base(torch.cat([x, x])) + hidden @ up.T
    close(y, torch.cat([a(x, base) for a in both]))


def test_ensemble_is_the_maximum_of_softmaxes():
    a, b = randn(5, 4), randn(5, 4, seed=1)
    expected = torch.maximum(a.softmax(-1), b.softmax(-1))
    assert torch.equal(max_ensemble(a, b), expected)
    assert not torch.equal(max_ensemble(a, b), (a.softmax(-1) + b.softmax(-1)) / 2)


def test_merge_of_earlier_tasks_is_out_of_place():
    current, earlier = randn(9), [randn(9, seed=1), randn(9, seed=2)]
    kept = current.clone()
    close(merge_earlier(current, earlier, 0.1), 0.9 * kept + 0.1 * (earlier[0] + earlier[1]) / 2)
    assert torch.equal(current, kept)
    alone = merge_earlier(current, [])
    assert torch.equal(alone, current) and alone.data_ptr() != current.data_ptr()


def table(answers):
    """A predictor from {ids or None: classes}: logits whose largest entries are those classes."""
    calls = []

    def predict(ids):
        calls.append(None if ids is None else tuple(ids.tolist()))
        classes = torch.tensor(answers[calls[-1]])
        return torch.nn.functional.one_hot(classes, 6).double() * 3

    return predict, calls


TASK_OF = torch.tensor([0, 0, 1, 1, 2, 2])


def test_retrieval_goes_to_its_fixed_point():
    predict, calls = table({None: [0, 5], (0, 2): [3, 4], (1, 2): [2, 5]})
    scores, ids, rounds = retrieve(predict, TASK_OF)
    assert calls == [None, (0, 2), (1, 2)] and ids.tolist() == [1, 2] and rounds == 2
    one = torch.nn.functional.one_hot
    first, last = (one(torch.tensor(c), 6).double() * 3 for c in ([0, 5], [2, 5]))
    close(scores, first.softmax(-1) + last.softmax(-1))


def test_retrieval_without_a_fixed_point_stops():
    predict, calls = table({None: [0], (0,): [2], (1,): [0]})
    _, ids, rounds = retrieve(predict, TASK_OF, rounds=4)
    assert rounds == 4 and calls == [None, (0,), (1,), (0,), (1,)] and ids.tolist() == [1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: MomentumPair(lora(), beta=1.5), r"beta must lie in \[0, 1\], got 1.5"),
        (lambda: Arena(lora(), lora().float()), "one dtype and device required, got"),
        (lambda: merge_earlier(randn(9), [randn(8)]), r"arenas of \[9\] required, got \[\[8\]\]"),
        (lambda: merge_earlier(randn(9), [], -0.1), r"share must lie in \[0, 1\]"),
        (lambda: retrieve(table({None: [0]})[0], TASK_OF, rounds=0), "rounds must be at least 1, got 0"),
        (lambda: retrieve(table({None: [0]})[0], TASK_OF[:4]), r"task_of must be \[6\], got \[4\]"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
