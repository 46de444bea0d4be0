import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rfkernels.variants.adaptive import ACM, budget_loss, distillation_loss, gate_labels
from tests.variants.reference import close, randn, randomise

WIDTH, HIDDEN, LEARNERS = 12, 24, 4


def acm(least=0):
    return randomise(ACM(WIDTH, HIDDEN, LEARNERS, least=least)).eval()


def nested(model, x, k):
    """Token by token, learner by learner."""
    out = torch.zeros_like(x)
    share = HIDDEN // LEARNERS
    for at in itertools.product(*(range(n) for n in x.shape[:-1])):
        for i in range(int(k[at])):
            w = slice(i * share, (i + 1) * share)
            h = F.linear(x[at], model.fc1.weight[w], model.fc1.bias[w])
            out[at] += model.fc2.weight[:, w] @ F.gelu(h, approximate="tanh") + model.bias[i]
    return out


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 11)])
def test_sorted_tokens_are_the_nested_sum(shape):
    model, x = acm(), randn(*shape, WIDTH, seed=1)
    k = torch.randint(0, LEARNERS + 1, shape, generator=torch.Generator().manual_seed(2))
    close(model(x, k), nested(model, x, k))


@pytest.mark.parametrize("count", range(LEARNERS + 1))
def test_equal_counts_and_prefixes(count):
    model, x = acm(), randn(2, 5, WIDTH, seed=1)
    k = torch.full((2, 5), count)
    close(model(x, k), nested(model, x, k))
    close(model.prefixes(x)[count], nested(model, x, k))


def test_all_learners_are_the_mlp():
    fc1, fc2 = randomise(nn.Linear(WIDTH, HIDDEN), 1), randomise(nn.Linear(HIDDEN, WIDTH), 2)
    model, x = ACM.from_mlp(fc1, fc2, LEARNERS), randn(9, WIDTH, seed=1)
    whole = fc2(F.gelu(fc1(x), approximate="tanh"))
    close(model(x, torch.full((9,), LEARNERS)), whole)
    best = (fc1.weight.norm(dim=1) * fc2.weight.norm(dim=0)).argsort(descending=True)[: HIDDEN // LEARNERS]
    h = F.gelu(F.linear(x, fc1.weight[best], fc1.bias[best]), approximate="tanh")
    close(model(x, torch.ones(9, dtype=torch.int64)), F.linear(h, fc2.weight[:, best], fc2.bias))
    assert torch.equal(model(x, torch.zeros(9, dtype=torch.int32)), torch.zeros_like(x))


@pytest.mark.parametrize("least", [0, 1])
def test_the_gate_chooses(least):
    model, x = acm(least), randn(40, WIDTH, seed=1)
    model.gate[2].bias[0] += 0.7 - 0.7 * least
    k = F.linear(F.gelu(F.linear(x, model.gate[0].weight, model.gate[0].bias)), model.gate[2].weight)
    k = (k + model.gate[2].bias).argmax(-1) + least
    assert k.min() == least and len(k.unique()) > 2
    close(model(x), nested(model, x, k))


def test_work_is_what_the_tokens_chose():
    model, x, seen = acm(), randn(40, WIDTH, seed=1), []
    plain = torch.nn.functional.linear
    k = torch.arange(40) % 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", lambda x, w, b=None: seen.append(len(x) * w.shape[0]) or plain(x, w, b))
        model(x, k)
    assert sum(seen[::2]) == int(k.sum()) * HIDDEN // LEARNERS


def test_training_is_inference_with_noise_and_has_gradients():
    model, x = acm(), randn(30, WIDTH, seed=1)
    model.requires_grad_(True).train()
    y = model(x, generator=torch.Generator().manual_seed(3))
    u = torch.rand((30, LEARNERS + 1), generator=torch.Generator().manual_seed(3))
    k = (model.gate(x) - (-u.log()).log()).argmax(-1)
    close(y, nested(model, x, k))
    y.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_labels_are_the_smallest_count_that_is_good_enough():
    model, x = acm(), randn(50, WIDTH, seed=1)
    prefixes, teacher = model.prefixes(x), randn(50, WIDTH, seed=2)
    error = ((prefixes - teacher) ** 2).sum(-1)
    assert torch.equal(gate_labels(prefixes, teacher, 0.0), error.argmin(0))
    before = gate_labels(prefixes, teacher, 0.0)
    for tolerance in (0.5, 5.0, 50.0, float("inf")):
        k = gate_labels(prefixes, teacher, tolerance)
        assert (k <= before).all()
        before = k
    assert not before.any() and (gate_labels(prefixes, teacher, 1e9, least=1) == 1).all()


def test_losses():
    prefixes, teacher = randn(3, 4, 5), randn(4, 5, seed=1)
    close(distillation_loss(prefixes, teacher), ((prefixes[1:] - teacher) ** 2).sum() / 4)
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 50.0]], dtype=torch.float64)  # 1 and 2 of 2 learners
    assert budget_loss(logits, 0.75).item() == pytest.approx(0.0, abs=1e-12)
    assert budget_loss(logits, 0.5).item() == pytest.approx(0.25**2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ACM(12, 26, 4), "learners that divide the hidden width"),
        (lambda: acm()(randn(3, WIDTH), torch.tensor([0, 5, 1])), r"k must lie in 0 .. 4, got 0 .. 5"),
        (lambda: acm()(randn(3, WIDTH), torch.tensor([0, -1, 1])), r"got -1 .. 1"),
        (lambda: acm()(randn(3, WIDTH), torch.tensor([0, 1])), r"integers \[3\], got torch.int64 \[2\]"),
        (lambda: gate_labels(randn(3, 2, 4), randn(2, 4), -1.0), "tolerance must be 0 or more, got -1.0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
