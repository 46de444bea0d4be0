"""Gradients of the norm room, and what torch asks of its ops."""

import pytest
import torch

from rfkernels import ops
from tests.emulator.build import load as load_emulator
from tests.ops.cases import BF16, F32, F64, every_device, widen
from tests.ops.norm_cases import (
    DEFAULTS,
    DTYPES,
    LEADS,
    NORMS,
    RESULTS,
    TOLERANCE,
    Inputs,
    as_tuple,
    every_op,
    wide,
)


def _leaves(tokens, options):
    """Every tensor of a call that may have a gradient, as leaves of their own."""
    tokens = tuple(t.detach().clone().requires_grad_() for t in tokens)
    options = {
        k: v.detach().clone().requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in options.items()
    }
    return (
        tokens,
        options,
        [*tokens, *(v for v in options.values() if isinstance(v, torch.Tensor) and v.requires_grad)],
    )


def _gradients(f, inputs, seed=3):
    results = as_tuple(f())
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(r.shape, generator=generator, dtype=F64).to(r.device, r.dtype) for r in results]
    return torch.autograd.grad(results, inputs, upstream)


@every_device
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("lead", [*LEADS, "index"], ids=str)
@every_op
def test_gradients_match_the_definition(name, lead, norm, affine, device):
    inputs = Inputs((2, 3, 4, 24), F64, F64, device)
    index = torch.randint(5, (2, 3, 4), generator=inputs.generator).to(device) if lead == "index" else None
    options = inputs.options(name, (5,) if lead == "index" else lead, norm, affine)
    tokens, options, leaves = _leaves(inputs.tokens(name), options)
    ours = _gradients(lambda: getattr(ops, name)(*tokens, index=index, **options), leaves)
    theirs = _gradients(lambda: getattr(ops, f"{name}_reference")(*tokens, index=index, **options), leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@every_device
@every_op
def test_gradcheck(name, device):
    inputs = Inputs((2, 3, 6), F64, F64, device)
    tokens, options, leaves = _leaves(inputs.tokens(name), inputs.options(name, (2,), "rms"))
    names = [k for k, v in options.items() if isinstance(v, torch.Tensor)]

    def f(*values):
        given = dict(zip(names, values[len(tokens) :], strict=True))
        return getattr(ops, name)(*values[: len(tokens)], **options | given)

    assert torch.autograd.gradcheck(f, leaves)


@every_device
def test_gradients_of_tables_of_two_shapes(device):
    inputs = Inputs((2, 3, 4, 24), F64, F64, device)
    options = dict(scale=inputs.table((2,)), shift=inputs.table((2, 1, 4)))
    tokens, options, leaves = _leaves(inputs.tokens("norm_modulate"), options)
    ours = _gradients(lambda: ops.norm_modulate(*tokens, **options), leaves)
    theirs = _gradients(lambda: ops.norm_modulate_reference(*tokens, **options), leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@every_device
@pytest.mark.parametrize("tables", [("gate",), ("scale",), ("shift",), ("gate", "shift")], ids=str)
def test_gradients_where_the_index_serves_some_tables(tables, device):
    inputs = Inputs((2, 5, 24), F64, F64, device)
    name = "gated_residual_norm_modulate"
    options = {table: inputs.table((3,)) for table in tables}
    options |= dict(weight=inputs.table(()), branch_norm="rms", branch_weight=inputs.table(()))
    index = torch.randint(3, (2, 5), generator=inputs.generator).to(device)
    tokens, options, leaves = _leaves(inputs.tokens(name), options)
    ours = _gradients(lambda: ops.gated_residual_norm_modulate(*tokens, index=index, **options), leaves)
    theirs = _gradients(
        lambda: ops.gated_residual_norm_modulate_reference(*tokens, index=index, **options), leaves
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@every_device
@pytest.mark.parametrize("used", [0, 1])
def test_gradients_of_one_result(used, device):
    inputs = Inputs((2, 5, 24), F64, F64, device)
    name = "gated_residual_norm_modulate"
    tokens, options, leaves = _leaves(inputs.tokens(name), inputs.options(name, (2,)))
    of = lambda op: torch.autograd.grad(op(*tokens, **options)[used].pow(2).sum(), leaves, allow_unused=True)
    ours, theirs = of(ops.gated_residual_norm_modulate), of(ops.gated_residual_norm_modulate_reference)
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            0 if mine is None else mine, 0 if wanted is None else wanted, rtol=1e-9, atol=1e-9
        )


@every_device
@pytest.mark.parametrize("dtypes", DTYPES[2:], ids=str)
@every_op
def test_gradients_keep_dtypes_and_round_once(name, dtypes, device):
    inputs = Inputs((2, 40, 256), *dtypes, device)
    tokens, options, leaves = _leaves(inputs.tokens(name), inputs.options(name, (2,), affine=False))
    ours = _gradients(lambda: getattr(ops, name)(*tokens, **options), leaves)
    wide_tokens, wide_options, wide_leaves = _leaves(widen(tokens), {k: wide(v) for k, v in options.items()})
    theirs = _gradients(lambda: getattr(ops, f"{name}_reference")(*wide_tokens, **wide_options), wide_leaves)
    for leaf, mine, wanted in zip(leaves, ours, theirs, strict=True):
        assert mine.dtype == leaf.dtype
        error = (mine.double() - wanted).norm() / wanted.norm()
        assert error <= (6e-3 if dtypes[0] == BF16 else 1e-3), error


@every_device
@every_op
def test_backward_keeps_the_inputs_alone(name, device):
    inputs = Inputs((2, 40, 256), F32, F32, device)
    tokens, options, leaves = _leaves(inputs.tokens(name), inputs.options(name, (2,)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        results = as_tuple(getattr(ops, name)(*tokens, **options))
    allowed = {t.data_ptr() for t in [*leaves, results[0]]}
    assert kept and {t.data_ptr() for t in kept} <= allowed


@pytest.mark.parametrize("wants_sums", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_the_cuda_backward_gives_what_the_cpu_gives(norm, dtypes, wants_sums):
    kernel = ops.OPS["ada_norm_backward"]
    for shape, act in [((2, 6, 40), "one_plus"), ((4, 5, 77), "tanh"), ((1, 3, 1032), "plain")]:
        inputs = Inputs(shape, *dtypes, "cpu")
        dy, v, add = (inputs.draw(shape, dtypes[0]) for _ in range(3))
        table, weight, rows = inputs.table((3,)), inputs.table(()), shape[0] * shape[1]
        ids = torch.randint(3, shape[:2], generator=inputs.generator)
        sorted_ids, order = ids.reshape(-1).sort(stable=True)
        begins = torch.searchsorted(sorted_ids, torch.arange(4))
        args = (dy, v, add, weight, table, ids, order, begins, 3, 2, wants_sums, norm, act, 1e-6)
        expected = kernel(*args)
        exact_args = [wide(a) for a in args]
        ours = tuple(torch.full_like(t, torch.nan) for t in kernel.empty(*args))
        load_emulator().ada_norm_backward(*ours, *args)
        for mine, cpu, exact in zip(ours, expected, kernel.reference(*exact_args), strict=True):
            tolerance = TOLERANCE[dtypes[0]] if mine.dtype == dtypes[0] else 1e-4
            torch.testing.assert_close(mine.double(), exact, rtol=tolerance, atol=tolerance * 4)
            torch.testing.assert_close(cpu.double(), exact, rtol=tolerance, atol=tolerance * 4)
        assert rows == len(order)


@every_device
@pytest.mark.parametrize("index", [False, True])
@every_op
def test_obeys_torch(name, index, device):
    inputs = Inputs((2, 3, 8), F64, F64, device)
    tokens, options, _ = _leaves(inputs.tokens(name), inputs.options(name, (3,) if index else (2,), "rms"))
    if index:
        options["index"] = torch.tensor([[0, 2, 1], [1, 1, 0]], device=device)
    args = (*tokens, *(DEFAULTS[name] | options).values())
    op = ops.OPS[name]
    torch.library.opcheck(op.functional, args)
    detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
    outs = as_tuple(op.empty(*detached))
    torch.library.opcheck(op.out_variant, (*outs, *detached))


@every_device
@every_op
def test_compiles_without_graph_breaks(name, device):
    inputs = Inputs((2, 3, 8), F32, F32, device)
    tokens, options, leaves = _leaves(inputs.tokens(name), inputs.options(name, (2,)))
    torch._dynamo.reset()
    op = lambda: [r * 2 for r in as_tuple(getattr(ops, name)(*tokens, **options))]
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(), op(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(
        _gradients(lambda: tuple(compiled()), leaves), _gradients(lambda: tuple(op()), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@every_op
def test_refuses_a_gradient_through_out(name):
    inputs = Inputs((2, 3, 8), F32, F32, "cpu")
    tokens, options, _ = _leaves(inputs.tokens(name), inputs.options(name, (2,)))
    out = tuple(torch.zeros(2, 3, 8) for _ in range(RESULTS[name]))
    with pytest.raises(RuntimeError, match="out= has no gradient"):
        getattr(ops, name)(*tokens, **options, out=out if len(out) > 1 else out[0])
