"""LoRALinear: one branch for all adapters, against the formulas in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rfkernels.adapters.base import Adapter, Factors
from rfkernels.nn import LoRALinear, QuantLinear, run_linear
from tests.adapters.layers import Running, close, layer, randn

OUT, IN = 10, 12


def factors(rank: int, seed: int, scale: float = 0.7, **others) -> Factors:
    return Factors(randn(rank, IN, seed=seed), randn(OUT, rank, seed=seed + 1), scale, **others)


def loaded(base: nn.Module, *adapters: Factors, strengths=None, ranks=None) -> LoRALinear:
    module = LoRALinear(base, ranks or [len(a.down) for a in adapters])
    for slot, adapter in enumerate(adapters):
        module.load(slot, adapter)
    given = torch.ones(len(module.ranks), dtype=torch.float64)
    module.write(given if strengths is None else torch.tensor(strengths, dtype=torch.float64))
    return module


def by_hand(base: nn.Linear, *pairs):
    """x -> x (W + sum w s B A)^T + b + sum w c"""
    weight, bias = base.weight.clone(), 0 if base.bias is None else base.bias
    for adapter, strength in pairs:
        weight = weight + strength * adapter.scale * adapter.up @ adapter.down
        bias = bias if adapter.bias is None else bias + strength * adapter.bias
    return lambda x: x @ weight.T + bias


def test_merge_and_stack_identities():
    """lora merge; lora stack = concat rank."""
    base, x, one, two = layer(OUT, IN), randn(2, 7, IN, seed=5), factors(3, 1), factors(2, 3, 0.3)
    close(loaded(base, one)(x), by_hand(base, (one, 1))(x))
    close(loaded(base, one, two, strengths=[0.5, -2])(x), by_hand(base, (one, 0.5), (two, -2))(x))
    cat = Factors(torch.cat((one.down, two.down)), torch.cat((0.5 * 0.7 * one.up, -2 * 0.3 * two.up), 1))
    close(loaded(base, one, two, strengths=[0.5, -2])(x), loaded(base, cat)(x))


def test_fused_qkv_identity():
    """qkv block-diag: three adapters of a fused layer are one with a block diagonal B."""
    x, down = randn(7, IN, seed=1), [randn(2, IN, seed=10 + i) for i in range(3)]
    up = [randn(4, 2, seed=20 + i) for i in range(3)]
    fused = LoRALinear(nn.Linear(IN, 12, bias=False, dtype=torch.float64), [6])
    nn.init.zeros_(fused.base.weight)
    fused.load(0, Factors(torch.cat(down), torch.block_diag(*up)))
    fused.write(torch.ones(1))
    close(fused(x).detach(), torch.cat([x @ a.T @ b.T for a, b in zip(down, up, strict=True)], -1))


def test_batch_of_adapters_identity():
    """bgmv, with ranks that differ, adapters twice and no adapter at all: the loop over samples."""
    base, ranks, scales = layer(OUT, IN), [1, 4, 2], [0.5, 2.0, -1.0]
    adapters = [factors(r, 10 * i, s) for i, (r, s) in enumerate(zip(ranks, scales, strict=True))]
    ids = torch.tensor([0, 2, 2, 1, 0, 1, -1])
    module = loaded(base, *adapters)
    module.write(torch.eye(4, dtype=torch.float64)[ids][:, :3])
    x = randn(7, 5, IN, seed=3)
    y = module(x)
    for sample, i in enumerate(ids):
        pairs = [] if i < 0 else [(adapters[i], 1)]
        close(y[sample], by_hand(base, *pairs)(x[sample]))


@pytest.mark.parametrize("bias", [True, False])
def test_bias_of_an_adapter(bias):
    base, x = layer(OUT, IN, bias), randn(3, 4, IN, seed=1)
    adapter, plain = factors(2, 1, bias=randn(OUT, seed=9)), factors(1, 4)
    close(loaded(base, adapter, plain, strengths=[0.3, 2])(x), by_hand(base, (adapter, 0.3), (plain, 2))(x))
    module = loaded(base, adapter, plain)
    module.write(torch.tensor([[1.0, 0], [0, 1], [-2, 0.5]], dtype=torch.float64))
    wanted = [
        by_hand(base, (adapter, a), (plain, b))(x[i]) for i, (a, b) in enumerate([(1, 0), (0, 1), (-2, 0.5)])
    ]
    close(module(x), torch.stack(wanted))
    alone = Factors(randn(0, IN), randn(OUT, 0), bias=randn(OUT, seed=3))
    close(loaded(base, alone, strengths=[2])(x), base(x) + 2 * alone.bias)


def test_column_scale_of_dora():
    """y = k x W^T + b + k s (x A^T) B^T; a strength w moves from W to k V."""
    base, x, k = layer(OUT, IN), randn(4, IN, seed=1), randn(OUT, seed=8).abs()
    adapter = factors(2, 1, column_scale=k)
    moved = k[:, None] * (base.weight + 0.7 * adapter.up @ adapter.down)
    for w in (1.0, 0.4):
        weight = base.weight + w * (moved - base.weight)
        close(loaded(base, adapter, strengths=[w])(x), x @ weight.T + base.bias)


@pytest.mark.parametrize("base", [layer(OUT, IN), Running(layer(OUT, IN))], ids=["nn.Linear", "run"])
def test_epilogue_after_the_branch(base):
    """r + g f(sum)."""
    if isinstance(base, Running):
        base.in_features, base.out_features, base.dtype = IN, OUT, torch.float64
    x, adapter = randn(2, 5, IN, seed=1), factors(2, 1, bias=randn(OUT, seed=2))
    inner = base.inner if isinstance(base, Running) else base
    module, residual = loaded(base, adapter), randn(2, 5, OUT, seed=4)
    y = by_hand(inner, (adapter, 1))(x)
    close(module(x, activation="relu", residual=residual), residual + F.relu(y))
    if base is inner:
        gate = randn(2, 1, OUT, seed=6)
        close(module(x, activation="gelu_tanh", gate=gate), gate * F.gelu(y, approximate="tanh"))


class Doubled(Adapter):
    """base(x) + sin of it: an adapter that is no product."""

    def forward(self, x, base):
        return base(x) + base(x).sin()


def test_extras_before_the_epilogue():
    base, x, adapter = layer(OUT, IN), randn(2, 5, IN, seed=1), factors(2, 1)
    module = loaded(base, adapter, ranks=[2, 0])
    module.load_extra(1, Doubled({}))
    module.write(torch.tensor([1.0, 0.5]))
    y = by_hand(base, (adapter, 1))(x) + 0.5 * base(x).sin()
    close(module(x), y)
    residual, gate = randn(2, 5, OUT, seed=4), randn(2, 1, OUT, seed=6)
    close(module(x, activation="silu", gate=gate, residual=residual), residual + gate * F.silu(y))
    module.write(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    close(module(x)[0], base(x[0]) + base(x[0]).sin())
    close(module(x)[1], by_hand(base, (adapter, 1))(x[1]))
    module.clear(1)
    assert not module.extras


def test_empty_slots_are_no_ops():
    base, x, adapter = layer(OUT, IN, dtype=torch.float32), randn(3, IN, dtype=torch.float32), factors(2, 1)
    module = LoRALinear(base, [4, 2])
    plain = run_linear(base, x)
    assert torch.equal(module(x), plain)
    module.load(1, adapter)
    assert torch.equal(module(x), plain)  # strength 0
    module.write(torch.ones(2))
    assert not torch.equal(module(x), plain)
    module.clear(1)
    assert torch.equal(module(x), plain)
    assert torch.equal(LoRALinear(base)(x), plain)


def test_narrower_adapter_after_a_wider():
    """Nothing of the adapter before stays in a slot."""
    base, x, wide, narrow = layer(OUT, IN), randn(3, IN), factors(4, 1), factors(1, 5)
    module = loaded(base, wide)
    module.load(0, narrow)
    close(module(x), by_hand(base, (narrow, 1))(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_take_the_dtype_of_the_layer(dtype):
    module = loaded(layer(OUT, IN, dtype=dtype), factors(3, 1))
    assert module.down.dtype == module.up.dtype == dtype
    assert module.scale.dtype == module.unit.dtype == torch.float32
    x = randn(2, 3, IN).to(dtype)
    y = by_hand(module.base.double(), (factors(3, 1), 1))(x.double())
    module.base.to(dtype)
    assert module(x).dtype == dtype
    assert (module(x).double() - y).norm() < {torch.float32: 1e-6}.get(dtype, 1e-2) * y.norm()


def test_conversions_keep_the_scales():
    module = loaded(layer(OUT, IN, dtype=torch.float32), factors(3, 1), strengths=[0.1])
    scale = module.scale.clone()
    module.half().float()
    assert module.scale.dtype == torch.float32 and torch.equal(module.scale, scale)
    module.double()
    assert module.scale.dtype == torch.float64 and module.down.dtype == torch.float64


def test_compiles_whole():
    """With every kind of adapter; a write or a swap reaches the compiled layer."""
    base, x = layer(OUT, IN), randn(2, 5, IN, seed=1)
    module = loaded(base, factors(2, 1, bias=randn(OUT, seed=2)), factors(1, 7))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for strengths in ([1.0, 1.0], [0.0, -1.0]):
        module.write(torch.tensor(strengths))
        close(compiled(x, activation="gelu"), module(x, activation="gelu"))
    module.load(1, factors(1, 30))
    close(compiled(x, activation="gelu"), module(x, activation="gelu"))
    module.write(torch.tensor([[1.0, 0], [0, 1]]))
    close(compiled(x), module(x))
    module.add_slot(0)
    module.load_extra(2, Doubled({}))
    module.write(torch.ones(3))
    close(compiled(x), module(x))


def test_factors_are_parameters_of_a_frozen_base():
    module = loaded(layer(OUT, IN), factors(2, 1))
    assert {n for n, _ in module.named_parameters()} == {"base.weight", "base.bias", "down", "up"}
    assert not any(p.requires_grad for p in module.parameters())
    module.down.requires_grad_()
    module.add_slot(1)
    assert module.down.requires_grad and not module.up.requires_grad
    other = LoRALinear(copy.deepcopy(module.base), module.ranks)
    other.load_state_dict(module.state_dict())
    close(other(randn(2, IN)), module(randn(2, IN)))


def test_refusals():
    module = LoRALinear(layer(OUT, IN), [2])
    with pytest.raises(
        ValueError, match=r"down and up must be \(2, 12\) and \(10, 2\), got \(2, 11\) and \(10, 2\)"
    ):
        module.load(0, Factors(torch.ones(2, 11), torch.ones(10, 2)))
    with pytest.raises(ValueError, match="strengths of DoRA must be one per slot"):
        module.write(torch.ones(3, 1))
        module.load(0, factors(2, 1, column_scale=torch.ones(OUT)))


@pytest.mark.parametrize("format", [None, "int8-convrot", "w4a16", "svdq-int4"])
def test_adapters_train_beside_a_frozen_base(format):
    torch.manual_seed(0)
    base = torch.nn.Linear(64, 48).requires_grad_(False)
    if format:
        base = QuantLinear.from_linear(base, format, **({"group": 32} if format == "w4a16" else {}))
    layer = LoRALinear(base, [4])
    layer.load(0, Factors(torch.randn(4, 64) / 8, torch.zeros(48, 4)))
    layer.write(strength=torch.ones(1))
    layer.down.requires_grad_()
    layer.up.requires_grad_()
    x, target = torch.randn(32, 64, requires_grad=True), torch.randn(32, 48)
    optimizer = torch.optim.Adam([layer.down, layer.up], 1e-2)
    losses = []
    for _ in range(30):
        loss = (layer(x, activation="silu") - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0] and x.grad.abs().sum() > 0
