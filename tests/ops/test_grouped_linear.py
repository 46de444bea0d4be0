"""grouped_linear: products of segments of rows, each with the weight of its expert."""

import random
from dataclasses import dataclass, field

import pytest
import torch

from rfkernels import _C, ops
from tests.emulator.build import load as load_emulator
from tests.ops.cases import BF16, DEVICES, F16, F32, F64, KERNELS

NAN = float("nan")
DTYPES = [F64, F32, F16, BF16]
TOLERANCE = {F64: 1e-13, F32: 3e-6, F16: 1e-3, BF16: 8e-3}  # of norms; rounding alone is a third of it
INSTRUCTIONS = ["generic", "avx2", "avx512", "avx512_bf16"]
every_kernel = pytest.mark.parametrize("device", KERNELS)
every_device = pytest.mark.parametrize("device", DEVICES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# rows of the experts: one; none at all; ragged; all in one, empty ones around it; more than a tile
COUNTS = [(1,), (0, 0), (5, 0, 13, 1), (0, 40, 0), (70, 3, 130)]


@dataclass
class Call:
    """Random arguments of one call."""

    counts: tuple[int, ...]
    n: int
    k: int
    dtype: torch.dtype
    gated: bool = False
    bias: bool = False
    indexed: bool = True
    behind: int = 0  # slots behind the last expert
    gap: int = 0  # elements between the rows of x
    shift: int = 0  # elements by which x and the weights are off 16 bytes
    device: str = "cpu"
    seed: int = 0
    args: dict = field(init=False)

    def __post_init__(self):
        self.memory = "cpu" if self.device == "emulated" else self.device
        self.generator = torch.Generator().manual_seed(self.seed)
        experts, slots = len(self.counts), sum(self.counts) + self.behind
        rows = slots // 2 + 1 if self.indexed else slots
        weights = lambda: [self.tensor(self.n, self.k) * self.k**-0.5 for _ in range(experts)]
        biases = lambda: [self.tensor(self.n) for _ in range(experts)] if self.bias else []
        index = torch.randint(max(rows, 1), (slots,), generator=self.generator, dtype=torch.int32)
        self.args = {
            "x": self.placed(self.tensor(rows, self.k + self.gap))[:, : self.k],
            "weights": list(map(self.placed, weights())),
            "offsets": torch.tensor((0, *self.counts), dtype=torch.int32).cumsum(0, dtype=torch.int32),
            "index": index if self.indexed else None,
            "up": list(map(self.placed, weights())) if self.gated else [],
            "bias": biases(),
            "up_bias": biases() if self.gated else [],
        }
        for name in ("offsets", "index"):
            if self.args[name] is not None:
                self.args[name] = self.args[name].to(self.memory)

    def tensor(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=F64).to(self.memory, self.dtype)

    def placed(self, t):
        """The same numbers, `shift` elements past 16 bytes."""
        if not self.shift:
            return t
        room = t.new_zeros(t.numel() + self.shift)[self.shift :].view_as(t)
        return room.copy_(t)

    def run(self, **changed):
        args = self.args | changed
        if self.device == "emulated":
            out = args["x"].new_full((sum(self.counts) + self.behind, self.n), 77)
            load_emulator().grouped_linear(out, *args.values(), None)
            return out
        return ops.OPS["grouped_linear"](*args.values())

    def exact(self):
        wide = {k: v.double() if k == "x" else v for k, v in self.args.items()}
        for name in ("weights", "up", "bias", "up_bias"):
            wide[name] = [t.double() for t in wide[name]]
        return ops.grouped_linear_reference(*wide.values())

    def check(self):
        got, exact, tolerance = self.run(), self.exact(), TOLERANCE[self.dtype]
        assert got.dtype == self.dtype and got.shape == exact.shape and got.isfinite().all()
        error = got.double() - exact
        assert error.norm() <= tolerance * exact.norm()
        if error.numel():
            assert error.abs().amax() <= 4 * tolerance * exact.abs().amax()
        assert (got[sum(self.counts) :] == 0).all()


@every_kernel
@every_dtype
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_products_are_those_of_the_definition(counts, gated, dtype, device):
    Call(counts, 70, 48, dtype, gated, device=device, behind=3).check()
    Call(counts, 33, 21, dtype, gated, bias=True, indexed=False, gap=3, device=device).check()


@pytest.mark.parametrize("level", INSTRUCTIONS)
@every_dtype
def test_products_with_every_instruction_set(dtype, level):
    there = _C.limit_instructions(level)
    try:
        assert there or level != "generic"
        for counts in COUNTS:
            Call(counts, 70, 131, dtype, True, True, behind=1).check()
    finally:
        _C.limit_instructions("avx512_bf16")


def test_products_fuzzed():
    r = random.Random(0)
    for seed in range(150):
        Call(
            tuple(r.choice([0, 0, 1, 3, 12, 13, 50]) for _ in range(r.choice([1, 2, 4, 9, 64]))),
            *(r.choice([1, 7, 32, 64, 96, 100]) for _ in range(2)),
            r.choice(DTYPES),
            *(r.random() < 0.5 for _ in range(3)),
            behind=r.choice([0, 0, 5]),
            gap=r.choice([0, 1, 8]),
            shift=r.choice([0, 0, 1]),
            device=r.choice(DEVICES),
            seed=seed,
        ).check()


def test_emulated_products_fuzzed():
    r = random.Random(1)
    for seed in range(16):
        Call(
            tuple(r.choice([0, 1, 3, 12, 13, 70]) for _ in range(r.choice([1, 2, 4]))),
            *(r.choice([1, 7, 32, 72, 130]) for _ in range(2)),
            r.choice([F32, F64, F16, F16, BF16, BF16]),
            *(r.random() < 0.5 for _ in range(3)),
            behind=r.choice([0, 0, 5]),
            gap=r.choice([0, 1, 8]),
            shift=r.choice([0, 0, 1]),
            device="emulated",
            seed=seed,
        ).check()


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_emulated_tiles_of_128_rows(dtype):
    # of 256 slots for each expert and more
    Call((140,), 40, 72, dtype, gated=True, bias=True, behind=116, device="emulated").check()
    Call((135, 0), 136, 40, dtype, behind=377, device="emulated").check()


@every_device
def test_a_16_bit_result_is_the_float32_one_rounded(device):
    for gated in (False, True):
        call = Call((5, 0, 30), 70, 48, F16, gated, bias=True, device=device)
        wide = {k: v.float() if k == "x" else v for k, v in call.args.items()}
        for name in ("weights", "up", "bias", "up_bias"):
            wide[name] = [t.float() for t in wide[name]]
        exact, got = ops.OPS["grouped_linear"](*wide.values()), call.run()
        if device == "cpu":
            assert torch.equal(got, exact.half())
        else:  # tensor cores sum in another order
            torch.testing.assert_close(got, exact.half(), rtol=2e-3, atol=2e-3)


@every_kernel
@every_dtype
def test_rows_do_not_depend_on_each_other(dtype, device):
    call = Call((5, 0, 30), 70, 48, dtype, gated=True, device=device)
    poisoned = call.args["x"].clone()
    touched = call.args["index"] == call.args["index"][6]
    poisoned[call.args["index"][6]] = NAN
    got, clean = call.run(x=poisoned), call.run()
    assert got[touched].isnan().all() and torch.equal(got[~touched], clean[~touched])


@every_kernel
@every_dtype
def test_a_row_that_is_not_there_makes_nan(dtype, device):
    call = Call((5, 0, 30), 70, 48, dtype, gated=True, device=device, behind=2)
    index = call.args["index"].clone()
    index[3], index[7], index[-1] = -1, len(call.args["x"]), 1 << 30
    got, clean = call.run(index=index), call.run()
    expected = clean.clone()
    expected[3], expected[7] = NAN, NAN  # the last is behind all experts
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_emulated_offsets_are_confined():
    call = Call((5, 0, 30), 70, 48, BF16, device="emulated")
    for wrong in ([0, -9, 1000, 3], [7, 3, 2, 99], [0, 1 << 30, -1, 1 << 30]):
        call.run(offsets=torch.tensor(wrong, dtype=torch.int32))  # no access outside of the tensors


@every_device
def test_stacked_weights_are_the_list_of_them(device):
    call = Call((5, 0, 30), 70, 48, F32, gated=True, bias=True, device=device)
    names = ("weights", "up", "bias", "up_bias")
    args = {k: torch.stack(v) if k in names else v for k, v in call.args.items()}
    got = ops.grouped_linear(
        args.pop("x"), args.pop("weights"), args.pop("offsets"), activation="swiglu", **args
    )
    assert torch.equal(got, call.run())


@every_device
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_are_those_of_finite_differences(gated, indexed, device):
    call = Call((3, 0, 4), 5, 6, F64, gated, True, indexed, behind=2, device=device)
    names = [k for k in ("weights", "up", "bias", "up_bias") for _ in call.args[k]]

    def run(x, *tensors):
        args = {k: [t for n, t in zip(names, tensors, strict=True) if n == k] for k in dict.fromkeys(names)}
        return ops.OPS["grouped_linear"](*(call.args | args | {"x": x}).values())

    tensors = [t.requires_grad_() for k in dict.fromkeys(names) for t in call.args[k]]
    assert torch.autograd.gradcheck(run, [call.args["x"].requires_grad_(), *tensors])


@every_device
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gradients_are_made_for_what_needs_them(dtype, device):
    call = Call((5, 0, 30), 24, 16, dtype, gated=True, bias=True, device=device)
    exact = {k: v.double() if k == "x" else v for k, v in call.args.items()}
    for name in ("weights", "up", "bias", "up_bias"):
        exact[name] = [t.double().requires_grad_() for t in call.args[name]]
    ops.grouped_linear_reference(*exact.values()).sum().backward()
    for name in ("weights", "up", "bias", "up_bias"):
        fresh = {k: [t.clone() for t in v] if isinstance(v, list) else v for k, v in call.args.items()}
        fresh[name][2].requires_grad_()
        ops.OPS["grouped_linear"](*fresh.values()).sum().backward()
        grad = fresh[name][2].grad
        assert grad.dtype == dtype and not any(t.grad is not None for t in fresh[name][:2])
        expected = exact[name][2].grad
        assert (grad.double() - expected).norm() <= (1e-5 if dtype == F32 else 2e-2) * expected.norm()


@every_device
def test_op_obeys_torch(device):
    call = Call((3, 0, 4), 5, 6, F64, True, True, device=device)
    args = tuple(call.args.values())
    for t in (args[0], *args[1], *args[5]):
        t.requires_grad_()
    torch.library.opcheck(ops.OPS["grouped_linear"].functional, args)
    with torch.no_grad():
        plain = [[t.detach() for t in a] if isinstance(a, list) else a.detach() for a in args]
        torch.library.opcheck(ops.OPS["grouped_linear"].out_variant, (call.run(), *plain))


@every_device
def test_op_compiles_without_graph_breaks(device):
    call = Call((3, 0, 4), 5, 6, F32, True, True, device=device)
    torch._dynamo.reset()
    run = torch.compile(lambda a: ops.OPS["grouped_linear"](*a) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(tuple(call.args.values())), call.run() * 2)


X, W = torch.zeros(6, 8), [torch.zeros(4, 8), torch.zeros(4, 8)]
AT = torch.tensor([0, 2, 6], dtype=torch.int32)
B = [torch.zeros(4)] * 2


def integers(*values):
    return torch.tensor(values, dtype=torch.int32)


REFUSALS = [
    (lambda: ops.grouped_linear(X[0], W, AT), r"x \[rows, in\] and weights \[out, in\]"),
    (lambda: ops.grouped_linear(X, [], AT), "of 1..64 experts"),
    (lambda: ops.grouped_linear(X, W * 33, AT), "weights of 1..64 experts, got 66"),
    (
        lambda: ops.grouped_linear(X, [W[0], W[1].double()], AT),
        r"weights must be contiguous \[4, 8\] like x f32",
    ),
    (lambda: ops.grouped_linear(X, [W[0], torch.zeros(8, 4).T], AT), r"weights must be contiguous \[4, 8\]"),
    (lambda: ops.grouped_linear(X, [W[0], W[1][:3]], AT), r"got f32\[3, 8\]"),
    (lambda: ops.grouped_linear(X.long(), W, AT), "x must be floating"),
    (lambda: ops.grouped_linear(torch.zeros(8, 6).T, W, AT), "adjacent along the last axis"),
    (lambda: ops.grouped_linear(X, W, AT[:2]), r"offsets must be i32\[3\]"),
    (lambda: ops.grouped_linear(X, W, AT.long()), r"offsets must be i32\[3\]"),
    (lambda: ops.grouped_linear(X, W, integers(0, 2, 7)), "offsets must rise from 0 to at most the 6 slots"),
    (lambda: ops.grouped_linear(X, W, integers(0, 4, 3)), "falling in between"),
    (lambda: ops.grouped_linear(X, W, integers(1, 2, 6)), "offsets must rise from 0"),
    (lambda: ops.grouped_linear(X, W, AT, index=torch.arange(6)), r"index must be contiguous i32\[slots\]"),
    (lambda: ops.grouped_linear(X, W, AT, bias=B[:1]), "a tensor of bias for each of 2 experts, got 1"),
    (lambda: ops.grouped_linear(X, W, AT, bias=[b[:3] for b in B]), r"bias must be contiguous \[4\]"),
    (lambda: ops.grouped_linear(X, W, AT, up_bias=B), "up_bias needs up"),
    (lambda: ops.grouped_linear(X, W, AT, up=W), "'swiglu' with up, got 'none' with up"),
    (lambda: ops.grouped_linear(X, W, AT, activation="swiglu"), "got 'swiglu' without up"),
    (lambda: ops.grouped_linear(X, W, AT, activation="gelu"), "activation must be 'none', or 'swiglu'"),
    (lambda: ops.grouped_linear(X, W, AT, activation="swiglu", up=W[:1]), "a tensor of up for each of 2"),
]


@pytest.mark.parametrize("call, message", REFUSALS, ids=[m[:40] for _, m in REFUSALS])
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
