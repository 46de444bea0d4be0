"""The CUDA half of `linear` against its definition in float64."""

import random

import pytest
import torch

from rfkernels.ops.linear import linear_reference
from tests.emulator.linear_calls import (
    AS_THEY_ARE,
    BF16,
    E4M3,
    F16,
    F32,
    F64,
    FMA_KINDS,
    I8,
    TENSOR_CORE_KINDS,
    Call,
    assert_close,
)

ACTIVATIONS = ["none", "relu", "gelu", "gelu_tanh", "silu", "relu2"]
M, N = 127, 122  # what the tiles are tried on, and the multiprocessors with which they are taken
TILES = {"wide": 1, "middle": 3, "narrow": 8}
every_kind = pytest.mark.parametrize("kind", TENSOR_CORE_KINDS, ids=str)


def check(emulated, *args, **kwargs):
    call = Call(*args, **kwargs)
    assert_close(call, call.run(emulated))


@pytest.fixture(params=TILES)
def tile(request, emulated):
    emulated.set_processors(TILES[request.param])
    assert all(
        emulated.linear_tile(M, N, TILES[request.param], bool(half)) == request.param for half in (0, 1)
    )
    yield request.param
    emulated.set_processors(1)


@every_kind
def test_emulated_tiles(emulated, tile, kind):
    check(emulated, M, N, 224, *kind)


@pytest.mark.parametrize("groups", [1, 3, 7])  # of 224, 96 (no power of two) ... and 32 inputs
@pytest.mark.parametrize("zero", ["none", "integer", "offset"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("m", [1, 5, 70])
def test_emulated_groups_of_four_bit_codes(emulated, m, dtype, zero, groups):
    k = 224 if groups != 3 else 288
    check(
        emulated, m, 40, k, dtype, "int4", groups=groups, zero=zero, scale_dtype=F32 if groups == 7 else dtype
    )


@pytest.mark.parametrize("k, groups", [(256, 4), (256, 8), (256, 2), (160, 5), (192, 2)])
def test_emulated_groups_beside_int8(emulated, tile, k, groups):
    check(emulated, M, N, k, I8, "int4", groups=groups)


@pytest.mark.parametrize("dtype", [BF16, F32, I8], ids=str)
def test_emulated_groups_of_any_length(emulated, dtype):  # that no slab is a multiple of
    check(emulated, 11, 9, 120, dtype, "int4", groups=5)
    check(emulated, 2, 9, 120, dtype, "int4", groups=3, zero="none" if dtype == I8 else "offset")


def test_emulated_zeros_beside_int8(emulated):
    check(emulated, 11, 9, 128, I8, "int4", groups=2, zero="integer")
    check(emulated, 11, 9, 128, I8, "int4", groups=2, zero="offset")


@pytest.mark.parametrize("kind", [*TENSOR_CORE_KINDS, *FMA_KINDS], ids=str)
@pytest.mark.parametrize("m, n, k", [(1, 3, 34), (7, 33, 64), (9, 1, 2), (12, 41, 130)], ids=str)
def test_emulated_shapes(emulated, kind, m, n, k):
    check(emulated, m, n, k, *kind)


@pytest.mark.parametrize("kind", [*TENSOR_CORE_KINDS, *FMA_KINDS], ids=str)
@pytest.mark.parametrize("m", [3, 20])
def test_emulated_strided_and_unaligned(emulated, kind, m):
    check(emulated, m, 24, 64, *kind, row_gap=16, residual=F64 if kind[0] == F64 else F32)
    check(emulated, m, 24, 66, *kind, row_gap=5, shift=1, residual=F64 if kind[0] == F64 else BF16)


@pytest.mark.parametrize("kind", [*TENSOR_CORE_KINDS, (F32, "floating"), (F64, "int8")], ids=str)
@pytest.mark.parametrize("rank", [1, 16, 40])
def test_emulated_low_rank_branch(emulated, kind, rank):
    for m in (2, 18):
        check(emulated, m, 40, 64, *kind, rank=rank)
        check(emulated, m, 40, 64, *kind, rank=rank, exact_branch=True)


@pytest.mark.parametrize("up_dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("x_dtype", [I8, BF16, F16, F32], ids=str)
def test_emulated_dtypes_of_the_low_rank_branch(emulated, tile, x_dtype, up_dtype):
    storage = "int8" if x_dtype == I8 else "floating"
    check(emulated, M, N, 64, x_dtype, storage, rank=72, up_dtype=up_dtype, dtype=F32, exact_branch=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("x_dtype", [I8, BF16, F32, F64], ids=str)
@pytest.mark.parametrize("m", [6, 24])
def test_emulated_epilogue(emulated, m, x_dtype, activation):
    wide = F64 if x_dtype == F64 else F32
    storage = "int8" if x_dtype == I8 else "floating"
    every = {"bias": wide, "gates": 3, "gate": wide, "residual": wide, "rank": 8}
    for n in (40, 37):
        check(
            emulated,
            m,
            n,
            64,
            x_dtype,
            storage,
            activation=activation,
            dtype=wide,
            exact_branch=True,
            **every,
        )


@pytest.mark.parametrize("table", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("m", [4, 12])
def test_emulated_dtypes_of_the_epilogue(emulated, m, dtype, table):
    for n in (16, 21):
        check(emulated, m, n, 64, BF16, bias=table, gates=2, gate=table, residual=table, dtype=dtype)


@pytest.mark.parametrize("kind", [(I8, "int8"), (BF16, "floating"), (F32, "floating")], ids=str)
@pytest.mark.parametrize("m", [4, 12])
def test_emulated_codes_as_the_result(emulated, kind, m):
    for n in (16, 21):
        check(emulated, m, n, 64, *kind, codes=True, bias=F32, activation="silu")
    call = Call(m, 16, 64, *kind, codes=True)
    call.args["bias"] = torch.tensor([1e9, -1e9] * 7 + [torch.nan, torch.inf])
    out = call.run(emulated)
    assert (out[:, 0:14:2] == 127).all() and (out[:, 1:14:2] == -127).all()
    assert (out[:, 14] == 0).all() and (out[:, 15] == 127).all()


def test_emulated_int8_sums_are_exact(emulated, tile):
    # Sums beyond 2^24, whose neighbours float cannot tell apart: only one that is exact gives its rounding.
    call = Call(M, N, 2048, I8, "int8", dtype=F32)
    call.args["x"] = torch.full_like(call.args["x"], 127) - torch.arange(M)[:, None].to(I8) % 3
    call.args["weight"] = torch.full_like(call.args["weight"], 127)
    call.args["weight"][:, 7] = torch.arange(N).to(I8)
    call.args["x_scale"], call.args["weight_scale"] = torch.ones(M), torch.ones(N)
    expected = call.args["x"].long() @ call.args["weight"].long().T
    assert torch.equal(call.run(emulated), expected.float())


def test_emulated_four_bit_sums_beside_int8_are_exact(emulated, tile):
    call = Call(M, N, 2048, I8, "int4", dtype=F32)
    call.args["x_scale"], call.args["weight_scale"] = torch.ones(M), torch.ones(N)
    assert torch.equal(call.run(emulated).double(), call.true())


@pytest.mark.parametrize("code", range(16))
@pytest.mark.parametrize("dtype", [BF16, F16, I8, F32], ids=str)
@pytest.mark.parametrize("m", [1, 10])
def test_emulated_every_four_bit_code(emulated, m, dtype, code):
    call = Call(m, 32, 64, dtype, "int4", dtype=F32)
    call.args["weight"] = torch.full_like(call.args["weight"], 17 * code)
    call.args["weight"][1::2, ::3] = 16 * (15 - code) + code
    assert_close(call, call.run(emulated))


@pytest.mark.parametrize(
    "kind", [(E4M3, "e4m3"), (BF16, "e4m3"), (F16, "e4m3"), (F32, "e4m3"), (F16, "int8")]
)
@pytest.mark.parametrize("m", [2, 10])
def test_emulated_every_eight_bit_code(emulated, m, kind):
    call = Call(m, 256, 32, *kind, dtype=F32, scale="none")
    codes = torch.arange(256, dtype=torch.uint8)
    weight = torch.zeros(256, 32, dtype=torch.uint8)
    for column in range(32):  # each code in every place of a lane
        weight[(codes.long() + column) % 256, column] = codes
    dtype = call.args["weight"].dtype
    call.args["weight"] = weight.view(dtype)
    call.args["x"] = torch.zeros(m, 32).to(kind[0])
    for row in range(m):
        call.args["x"][row, 3 * row] = 1
    if call.args["x_scale"] is not None:
        call.args["x_scale"] = torch.ones(m)
    expected = call.true()
    finite = expected.isfinite()
    out = call.run(emulated).double()
    assert torch.equal(out.isnan(), ~finite)
    assert torch.equal(out[finite], expected[finite])


@pytest.mark.parametrize("kind", [*TENSOR_CORE_KINDS, *FMA_KINDS], ids=str)
@pytest.mark.parametrize("m", [3, 20])
def test_emulated_nan_stays_in_its_row(emulated, kind, m):
    call = Call(m, 24, 64, *kind, rank=8, bias=F64 if kind[0] == F64 else F32)
    bad = call.args["x_scale"] if kind[0] == I8 else call.args["x"].view(m, -1)
    bad[1] = torch.nan
    out = call.run(emulated)
    assert out[1].isnan().all() and out.isnan().sum() == out.shape[1]


@pytest.mark.parametrize("kind", [(I8, "int8"), (BF16, "int4"), (F32, "int8")], ids=str)
@pytest.mark.parametrize("m", [3, 20])
def test_emulated_nan_of_a_scale_stays_in_its_column(emulated, kind, m):
    call = Call(m, 24, 64, *kind, groups=2 if kind[1] == "int4" else 1)
    call.args["weight_scale"][5] = torch.nan
    out = call.run(emulated)
    assert out[:, 5].isnan().all() and out.isnan().sum() == out.shape[0]


@pytest.mark.parametrize("kind", TENSOR_CORE_KINDS, ids=str)
def test_emulated_zero_rows(emulated, kind):
    call = Call(12, 16, 64, *kind)
    call.args["x"].view(12, -1)[2:5] = 0
    out = call.run(emulated)
    assert (out[2:5] == 0).all() and (out[5:] != 0).any()


def test_emulated_call_writes_its_rows_alone(emulated):
    for n in (16, 21):
        call = Call(10, n, 64, BF16, row_gap=11)
        out = call.run(emulated)
        behind = out.as_strided((10, n + 11), (n + 11, 1))[:, n:]
        assert (behind == 0).all()


@pytest.mark.parametrize("seed", range(60))
def test_emulated_fuzzed(emulated, seed):
    r = random.Random(seed)
    x_dtype, storage = r.choice([*TENSOR_CORE_KINDS, *FMA_KINDS])
    wide = F64 if x_dtype == F64 else F32
    tables = [None, wide] if x_dtype == F64 else [None, F32, BF16, F16]
    groups = r.choice([1, 2, 4]) if storage == "int4" else 1
    k = r.choice([2, 16, 30, 64, 96, 200]) if groups == 1 else groups * r.choice([32, 64, 128])
    emulated.set_seed(seed)
    emulated.set_processors(r.choice([1, 2, 20]))
    m = r.choice([1, 2, 5, 8, 9, 40, 66])
    call = Call(
        m,
        r.choice([1, 8, 31, 64, 100]),
        k,
        x_dtype,
        storage,
        groups=groups,
        zero=r.choice(["none", "none", "integer", "offset"]) if x_dtype != I8 else "none",
        scale=r.choice(["none", "one", "row"]),
        rank=r.choice([0, 0, 1, 8, 33]),
        up_dtype=r.choice(tables),
        bias=r.choice(tables),
        gates=r.choice([0, 1, m]),
        gate=r.choice(tables[1:]),
        residual=r.choice(tables),
        activation=r.choice(ACTIVATIONS),
        dtype=wide if x_dtype == F64 else r.choice([F32, BF16, F16]),
        row_gap=r.choice([0, 0, 8, 3]),
        shift=r.choice([0, 0, 0, 1]),
        seed=seed,
    )
    try:
        assert_close(call, call.run(emulated))
    finally:
        emulated.set_processors(1)


SHAPES = [(1, 1), (9, 3072), (64, 64), (128, 128), (1024, 1536), (4608, 16), (4608, 3072), (32760, 5120)]


@pytest.mark.parametrize("fp8", [False, True])
def test_emulated_choice_of_a_tile(emulated, fp8):
    tile = lambda m, n, processors: emulated.linear_tile(m, n, processors, fp8)
    for processors in (1, 8, 28, 108, 132):
        assert {tile(m, n, processors) for m, n in SHAPES} <= set(TILES)
        assert tile(32760, 5120, processors) == "wide"  # work for every processor, many times over
        assert tile(1, 1, processors) == tile(16, 16, processors) == "narrow"  # one block does it all
    assert tile(4608, 3072, 8) == tile(4608, 3072, 132) == "wide"
    assert tile(1024, 1536, 8) == "wide"
    assert fp8 or tile(1024, 1536, 132) == "middle"  # 96 wide blocks would leave a third of 132 idle
    assert tile(4608, 16, 132) == tile(12, 3072, 132) == "narrow"


def test_emulated_choice_of_a_tile_fills_large_devices(emulated):
    # The more processors, the smaller the tile, where a shape has work for few wide ones.
    order = ["wide", "middle", "narrow"]
    for m, n in [(512, 512), (1024, 1024), (256, 3072)]:
        chosen = [order.index(emulated.linear_tile(m, n, 4**i, False)) for i in range(1, 6)]
        assert chosen[-1] == 2 and chosen[-1] > chosen[0]


def test_the_definition_is_that_of_the_op():
    call = Call(5, 7, 16, BF16, bias=F32)
    x, weight, bias = (call.args[name].double() for name in ("x", "weight", "bias"))
    assert torch.equal(call.true(), x @ weight.T + bias)
    assert linear_reference(*call.args.values(), *AS_THEY_ARE, "none", BF16).dtype == BF16
