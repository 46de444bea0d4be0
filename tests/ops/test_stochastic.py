"""Stochastic steps, their log-probability, and sums of squares with gradients."""

import math
from itertools import pairwise

import pytest
import torch

from rfkernels.ops import (
    combine,
    flow_grpo_coefs,
    noise_keys,
    philox_normal,
    sde_kl,
    sde_log_prob,
    sde_step,
    stack_rows,
    stochastic,
    sum_of_squares,
)
from tests.ops.cases import every_device

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
# Flow-GRPO's step on eight numbers, sigma .6 -> .45, noise level .7: computed once in numpy.
GOLDEN_MEAN = [
    *[0.600272295, 0.755751040, 0.183860184, -0.534250416],
    *[-0.695748760, -0.143348128, 0.584933288, 0.763591438],
]
GOLDEN_NEXT = [
    *[0.932311449, 0.427034769, 0.502674314, -0.836781338],
    *[-0.415556205, -0.395594260, 0.804184289, 0.581723878],
]


def golden():
    i = torch.arange(8, dtype=F64)[None]
    x, u, c = torch.sin(i + 1), torch.cos(0.7 * i + 0.3), torch.cos(0.7 * i + 0.5) + 0.1 * i / 8
    return x, u, c, torch.cos(3 * i)


def random(*shape, seed=0, dtype=F64, device="cpu"):
    keys = noise_keys(seed, shape[0], device=device)
    return philox_normal(shape, keys, dtype=dtype)


def test_flow_grpo_matches_the_golden_vectors():
    x, u, v, z = golden()
    c = flow_grpo_coefs(0.6, 0.45, 0.7)
    mean = c.x * x + c.v * v
    x_next = mean + c.std * z
    close = lambda a, b: torch.testing.assert_close(a, torch.tensor(b, dtype=F64), rtol=0, atol=1e-9)
    close(c.scale, 0.857321410)
    close(mean[0], GOLDEN_MEAN)
    close(x_next[0], GOLDEN_NEXT)
    close(sde_log_prob(x_next, [x, v], c.coefs, c.std), [-0.176274351])
    close(sde_kl(v, u, c.v, c.scale), [0.000746404])  # as in the authors' code
    exact = sde_kl(v, u, c.v, c.std)
    torch.testing.assert_close(exact, sde_kl(v, u, c.v, c.scale) / 0.15)


def test_flow_grpo_is_a_drift_and_its_correction():
    x, _, v, _ = golden()
    sigma, d, c = 0.6, -0.15, flow_grpo_coefs(0.6, 0.45)
    s2 = c.scale**2
    expected = x + d * (v + s2 / (2 * sigma) * (x + (1 - sigma) * v))
    torch.testing.assert_close(c.x * x + c.v * v, expected, rtol=0, atol=1e-15)
    euler = flow_grpo_coefs(0.6, 0.45, noise_level=0.0)
    assert [float(t) for t in euler] == [1.0, 0.45 - 0.6, 0.0, 0.0]


def test_flow_grpo_starts_at_one_and_ends_at_zero():
    grid = torch.tensor([1.0, 0.8, 0.3, 0.0], dtype=F64)
    c = flow_grpo_coefs(grid[:-1], grid[1:], 0.7, sigma_max=grid[1])
    assert all(t.isfinite().all() for t in c) and (c.std > 0).all()
    torch.testing.assert_close(c.scale[0], 0.7 * (1 / (1 - grid[1])).sqrt())
    for k in range(3):
        one = flow_grpo_coefs(grid[k], grid[k + 1], 0.7, sigma_max=0.8)
        assert torch.equal(one.coefs, c.coefs[:, k]) and torch.equal(one.std, c.std[k])
    with pytest.raises(ValueError, match="sigma_max below 1, got None"):
        flow_grpo_coefs(1.0, 0.9)
    with pytest.raises(ValueError, match="levels must fall"):
        flow_grpo_coefs(0.5, 0.9)


def test_flow_grpo_keeps_the_marginal():
    # Data N(.7, .5^2): the exact velocity is affine in x.
    batch, steps, m, s = 10_000, 200, 0.7, 0.5
    grid = torch.linspace(1, 0, steps + 1, dtype=F64)[:-1]  # the last step would leave its noise in
    x = random(batch, 1)
    keys = noise_keys(1, batch)
    for k, (sigma, after) in enumerate(pairwise(grid)):
        a = 1 - sigma
        variance = a * a * s * s + sigma * sigma
        v = (sigma - a * s * s) / variance * (x - a * m) - m
        c = flow_grpo_coefs(sigma, after, 0.7, sigma_max=grid[1])
        keys[:, 2] = k
        x, _ = sde_step([x, v], c.coefs, c.std, keys)
    a, sigma = 1 - grid[-1], grid[-1]
    mean, std = a * m, (a * a * s * s + sigma * sigma).sqrt()
    assert abs(x.mean() - mean) < 4 * std / batch**0.5
    assert abs(x.std() - std) < 4 * std / (2 * batch) ** 0.5


STDS = {"number": 0.3, "sample": (3,), "frame": (3, 1, 4), "element": (3, 2, 4, 5), "shared": (1, 2)}


def make_std(kind, device="cpu", dtype=F64):
    shape = STDS[kind]
    if isinstance(shape, float):
        return shape
    return (0.2 + random(*shape, seed=9, dtype=dtype, device=device).abs()).to(dtype)


def expected_log_prob(x_next, mean, std, reduce):
    std = torch.as_tensor(std, dtype=F64)
    std = std.reshape(*std.shape, *[1] * (mean.ndim - std.ndim)).expand(mean.shape)
    terms = torch.distributions.Normal(mean.double(), std).log_prob(x_next.double()).flatten(1)
    return terms.mean(1) if reduce == "mean" else terms.sum(1)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("kind", STDS)
def test_log_prob_is_that_of_a_normal_distribution(kind, reduce):
    x, v, x_next = (random(3, 2, 4, 5, seed=s) for s in range(3))
    std = make_std(kind)
    result = sde_log_prob(x_next, [x, v], [0.9, -0.2], std, reduce=reduce)
    expected = expected_log_prob(x_next, 0.9 * x - 0.2 * v, std, reduce)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    rows = torch.tensor([0.9, -0.2], dtype=F64)[:, None].repeat(1, 3)
    assert torch.equal(sde_log_prob(x_next, [x, v], rows, std, reduce=reduce), result)


@every_device
@pytest.mark.parametrize("dtypes", [(F64, F64), (F32, F32), (F32, BF16), (BF16, BF16)], ids=str)
@pytest.mark.parametrize("kind", STDS)
def test_step_and_log_prob_agree_to_the_bit(kind, dtypes, device):
    x = random(3, 2, 4, 5, seed=0, dtype=dtypes[0], device=device)
    v = random(3, 2, 4, 5, seed=1, dtype=dtypes[1], device=device)
    rows = torch.float64 if dtypes[0] == F64 else torch.float32
    std, keys = make_std(kind, device, rows), noise_keys(3, 3, device=device)
    x_next, log_prob = sde_step([x, v], [0.9, -0.2], std, keys)
    assert x_next.dtype == x.dtype and log_prob.dtype == F64 and log_prob.shape == (3,)
    again = sde_log_prob(x_next, [x, v.clone().requires_grad_()], [0.9, -0.2], std)
    assert torch.equal(again, log_prob)
    assert torch.equal((again - log_prob).exp(), torch.ones_like(again))
    tolerance = {F64: 1e-12, F32: 1e-5, BF16: 1e-5}[dtypes[0]]
    exact = expected_log_prob(x_next.cpu(), 0.9 * x.double().cpu() - 0.2 * v.double().cpu(),
                              std.cpu() if kind != "number" else std, "mean")  # fmt: skip
    torch.testing.assert_close(log_prob.cpu(), exact, rtol=0, atol=tolerance)


def test_fresh_log_prob_is_that_of_the_noise():
    x, v, keys = random(3, 50), random(3, 50, seed=1), noise_keys(5, 3)
    _, log_prob = sde_step([x, v], [0.9, -0.2], 0.25, keys, reduce="sum")
    z = philox_normal((3, 50), keys, dtype=F64)
    expected = -0.5 * z.square().sum(1) - 50 * math.log(0.25 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(log_prob, expected, rtol=1e-12, atol=0)


def test_step_reads_its_row_and_its_noise_at_the_step():
    x, v, keys = random(2, 6), random(2, 6, seed=1), noise_keys(5, 2)
    coefs = torch.tensor([[0.9, -0.1], [0.8, -0.2]], dtype=F64)
    std = torch.tensor([0.1, 0.3], dtype=F64)
    x_next, log_prob = sde_step([x, v], coefs, std, keys, step=torch.tensor(1))
    later = keys + torch.tensor([0, 0, 1])
    expected, expected_log_prob = sde_step([x, v], coefs[1], std[1], later)
    assert torch.equal(x_next, expected) and torch.equal(log_prob, expected_log_prob)


def test_a_sample_is_its_own():
    x, v, keys = random(4, 6), random(4, 6, seed=1), noise_keys(5, 4)
    x_next, log_prob = sde_step([x, v], [0.9, -0.2], 0.3, keys)
    alone = sde_step([x[2:3], v[2:3]], [0.9, -0.2], 0.3, keys[2:3])
    assert torch.equal(alone[0], x_next[2:3]) and torch.equal(alone[1], log_prob[2:3])


def test_no_noise_has_log_prob_zero_and_a_finite_gradient():
    x, v = random(2, 6), random(2, 6, seed=1).requires_grad_()
    for std in (0.0, torch.tensor([0.0, 0.5], dtype=F64), torch.zeros(2, 6, dtype=F64)):
        log_prob = sde_log_prob(random(2, 6, seed=2), [x, v], [1.0, -0.1], std)
        assert log_prob[0] == 0 and log_prob.isfinite().all()
        (grad,) = torch.autograd.grad(log_prob.sum(), v)
        assert grad.isfinite().all() and not grad[0].any()
    x_next, _ = sde_step([x, v], [1.0, -0.1], 0.0, noise_keys(0, 2))
    assert torch.equal(x_next, x - 0.1 * v.detach())


@pytest.mark.parametrize("kind", STDS)
def test_log_prob_has_exact_gradients(kind):
    x, v, x_next = (random(3, 2, 4, 5, seed=s).requires_grad_() for s in range(3))
    std = make_std(kind)
    inputs = (x, v, x_next) if isinstance(std, float) else (x, v, x_next, std.requires_grad_())

    def f(x, v, x_next, std=std):
        return sde_log_prob(x_next, [x, v], [0.9, -0.2], std)

    assert torch.autograd.gradcheck(f, inputs)


def test_log_prob_gradient_is_the_formula():
    x, v, x_next = random(2, 7), random(2, 7, seed=1).requires_grad_(), random(2, 7, seed=2)
    c = flow_grpo_coefs(0.6, 0.45)
    (grad,) = torch.autograd.grad(sde_log_prob(x_next, [x, v], c.coefs, c.std).sum(), v)
    mean = c.x * x + c.v * v.detach()
    torch.testing.assert_close(grad, (x_next - mean) / c.std**2 * c.v / 7, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("rows", [(), (2,), (2, 1, 4)], ids=str)
def test_sum_of_squares_has_exact_gradients(outputs, rows):
    tensors = [random(2, 3, 4, seed=s).requires_grad_() for s in range(5)]
    coefs = torch.randn(outputs, 5, *rows, dtype=F64, generator=torch.Generator().manual_seed(0))
    coefs.requires_grad_()
    wide = coefs.reshape(*coefs.shape, *[1] * (3 - len(rows)))
    expected = (wide * torch.stack(tensors)).sum(1).square().sum((2, 3)).T
    torch.testing.assert_close(sum_of_squares(tensors, coefs), expected, rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(lambda c, *t: sum_of_squares(t, c), (coefs, *tensors))


@every_device
def test_sum_of_squares_gives_each_tensor_a_gradient_of_its_dtype(device):
    x = random(2, 50, dtype=torch.float32, device=device).requires_grad_()
    v = random(2, 50, seed=1, dtype=torch.bfloat16, device=device).requires_grad_()
    w = random(2, 50, seed=2, dtype=torch.float16, device=device)
    loss = sum_of_squares([x, v, w], [1.0, -2.0, 0.5])
    assert loss.dtype == F64
    loss.sum().backward()
    o = x.double() - 2 * v.double() + 0.5 * w.double()
    assert x.grad.dtype == torch.float32 and v.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad.double(), 2 * o, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(v.grad.double(), -4 * o, rtol=2**-8, atol=1e-5)


def test_sum_of_squares_takes_numbers_and_rows():
    x, y = random(2, 3), random(2, 3, seed=1)
    c = torch.tensor([0.5, 2.0], dtype=F64)
    expected = (x - c[:, None] * y).square().sum(1)
    torch.testing.assert_close(sum_of_squares([x, y], [1.0, -c]), expected)
    two = sum_of_squares([x, y], [[1.0, -c], [1.0, 0.0]])
    torch.testing.assert_close(two, torch.stack([expected, x.square().sum(1)], 1))


def test_strided_tensors_are_taken():
    x, y = random(2, 3, 4).mT.requires_grad_(), random(2, 4, 3, seed=1)
    (grad,) = torch.autograd.grad(sum_of_squares([x, y], [1.0, -1.0]).sum(), x)
    torch.testing.assert_close(grad, 2 * (x - y).detach())


def test_gradients_take_one_launch(monkeypatch):
    calls = []
    monkeypatch.setattr(stochastic, "combine", lambda *a, **k: calls.append(k) or combine(*a, **k))
    tensors = [random(2, 3, seed=s).requires_grad_() for s in range(3)]
    sum_of_squares(tensors, [1.0, 2.0, 3.0]).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["number", "frame", "element"])
def test_log_prob_compiles_as_one_graph(kind):
    x, v, x_next = (random(3, 2, 4, 5, seed=s) for s in range(3))
    std = make_std(kind)

    def f(v):
        return sde_log_prob(x_next, [x, v], [0.9, -0.2], std).sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    a, b = v.clone().requires_grad_(), v.clone().requires_grad_()
    compiled(a).backward()
    f(b).backward()
    assert torch.equal(compiled(a), f(b))
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-14, atol=1e-14)


def test_step_compiles_as_one_graph():
    x, v, keys = random(2, 6), random(2, 6, seed=1), noise_keys(5, 2)
    coefs = torch.tensor([[0.9, -0.1], [0.8, -0.2]], dtype=F64)
    std, index = torch.tensor([0.1, 0.3], dtype=F64), torch.tensor(1)
    f = lambda x, v: sde_step([x, v], coefs, std, keys, step=index)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(x, v), f(x, v), strict=True))


def test_kl_is_that_of_two_normal_distributions():
    v, w = random(2, 6), random(2, 6, seed=1)
    normal = lambda u: torch.distributions.Normal(-0.2 * u, 0.3)
    expected = torch.distributions.kl_divergence(normal(v), normal(w))
    torch.testing.assert_close(sde_kl(v, w, -0.2, 0.3, reduce="sum"), expected.sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(sde_kl(v, w, -0.2, 0.3), expected.mean(1), rtol=1e-12, atol=0)
    assert not sde_kl(v, v, -0.2, 0.3).any() and not sde_kl(v, w, -0.2, 0.0).any()
    assert torch.autograd.gradcheck(lambda v: sde_kl(v, w, -0.2, 0.3), v.requires_grad_())


def test_refusals():
    x = random(2, 3)
    for call, message in [
        (lambda: sde_log_prob(x, [x], [1.0], 0.1, reduce="max"), "reduce must be .* got 'max'"),
        (lambda: sde_log_prob(x, [x, x], [1.0], 0.1), "expected 2 coefficients, got 1"),
        (lambda: sde_log_prob(x[:, :0], [x[:, :0]], [1.0], 0.1), r"with elements, got \[2, 0\]"),
        (lambda: sde_kl(x, x, 1.0, torch.ones(2, 3)), r"std must be .* got \[2, 3\]"),
        (lambda: sde_kl(x, x, 1.0, 0.1, reduce="max"), "reduce must be"),
        (lambda: sum_of_squares([x, x[:, :1]], [1.0, 2.0]), r"one shape, got \[\[2, 3\], \[2, 1\]\]"),
        (lambda: sum_of_squares([x], [1.0, 2.0]), r"expected 1 coefficients a row, got \[2\]"),
        (lambda: sum_of_squares([x], torch.ones(4, 1, dtype=F64)), r"got \[4, 1\]"),
        (lambda: stack_rows([torch.ones(1, 1, 1)], x), "more axes"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
