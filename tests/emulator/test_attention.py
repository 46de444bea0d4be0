"""The CUDA half of `attention` against its definition in float64."""

import pytest
import torch

from tests.emulator.attention_calls import BF16, F16, F32, F64, Call, assert_close, similarity

FLOATING = [BF16, F16, F32, F64]
HALF = [BF16, F16]
PRECISIONS = ["full", "int8", "fp8"]
every_dtype = pytest.mark.parametrize("dtype", FLOATING, ids=str)
every_half = pytest.mark.parametrize("dtype", HALF, ids=str)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)


def check(emulated, *args, **kwargs):
    call = Call(*args, **kwargs)
    assert_close(call, *call.run(emulated))


# relative error (L2) of eight bits, on normal numbers
LIMIT = {"int8": 2e-2, "fp8": 5e-2}


def check_eight_bits(emulated, limit=None, **kwargs):
    call = Call(**kwargs)
    out, lse = call.run(emulated)
    expected, expected_lse = call.true()
    error, cosine = similarity(out, expected)
    limit = limit or LIMIT[call.precision]
    assert error <= limit and cosine >= 1 - limit**2, (error, cosine)
    seen = expected_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    assert (lse - expected_lse)[seen].abs().max() < 0.05
    return call


@every_half
@pytest.mark.parametrize("d", [8, 40, 64, 72, 96, 128, 256])
def test_emulated_head_dimensions(emulated, dtype, d):
    check(emulated, 70, 67, d, dtype)


@pytest.mark.parametrize("d", [8, 96, 256])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_emulated_head_dimensions_without_tensor_cores(emulated, dtype, d):
    check(emulated, 35, 33, d, dtype)


@pytest.mark.parametrize("rows, keys", [(1, 1), (1, 200), (63, 0), (64, 63), (65, 64), (127, 65), (128, 127)])
def test_emulated_lengths(emulated, rows, keys):
    check(emulated, rows, keys, 64, BF16)
    check(emulated, rows, keys, 40, F32)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_emulated_many_tiles(emulated, d):  # of rows, and more of keys than slots
    for seed in (1, 2, 3):  # another order of blocks and warps
        emulated.set_seed(seed)
        check(emulated, 129 if seed == 1 else 20, 300, d, BF16)
    emulated.set_seed(0)


@every_dtype
@pytest.mark.parametrize("layout", ["bhld", "blhd", "qkv"])
def test_emulated_strides_and_grouped_heads(emulated, dtype, layout):
    check(emulated, 21, None, 24, dtype, batch=2, heads=4, kv_heads=2, layout=layout)
    check(emulated, 21, None, 24, dtype, batch=2, heads=4, kv_heads=1, layout=layout, shift=1)


@pytest.mark.parametrize("d", [1, 3, 37, 66])
def test_emulated_odd_head_dimensions(emulated, d):
    check(emulated, 9, 70, d, BF16, heads=2)
    check(emulated, 9, 70, d, F32, heads=2)


@pytest.mark.parametrize(
    "dtype, bias_dtype", [(BF16, BF16), (BF16, F32), (F16, F16), (F32, F32), (F64, F64)], ids=str
)
@pytest.mark.parametrize("axes", [(2, 2, 40), (1, 2, 1), (2, 1, 40)], ids=str)
def test_emulated_bias(emulated, dtype, bias_dtype, axes):
    call = Call(40, 70, 64, dtype, batch=2, heads=2, bias=axes, bias_dtype=bias_dtype)
    call.of("bias")[..., ::3, 5:30] = -torch.inf
    call.of("bias")[0, 0, 0] = -torch.inf  # rows that see nothing, of one or of all
    out, lse = call.run(emulated)
    assert_close(call, out, lse)
    assert (out[0, 0, 0] == 0).all() and lse[0, 0, 0] == -torch.inf


@every_dtype
@pytest.mark.parametrize("heads", [1, 2])
def test_emulated_factor(emulated, dtype, heads):
    check(emulated, 40, 70, 64, dtype, heads=2, factor=heads)
    check(emulated, 40, 70, 128, dtype, heads=2, factor=heads, bias=(1, 1, 40))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-9, 2.0])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_emulated_scales(emulated, dtype, scale):
    check(emulated, 10, 70, 64, dtype, scale=scale)


@every_dtype
def test_emulated_key_lengths(emulated, dtype):
    lengths = [0, 1, 63, 64, 65]
    call = Call(5, 66, 64, dtype, batch=len(lengths), key_lengths=lengths)
    for name in ("k", "v"):  # what is hidden is not seen
        for sample, length in enumerate(lengths):
            call.of(name)[sample, :, length:] = torch.nan
    out, lse = call.run(emulated)
    assert out.isfinite().all() and (lse[0] == -torch.inf).all()
    for name in ("k", "v"):
        call.args[name] = call.of(name).nan_to_num(nan=0.0)
    assert_close(call, out, lse)


@every_dtype
def test_emulated_shifted_heads(emulated, dtype):
    shifts = {"batch": 6, "frames": 3, "heads": 4, "kv_heads": 4, "head_shift": [1, 0, -1, 2]}
    check(emulated, 5, 9, 16, dtype, **shifts)
    check(emulated, 5, 9, 16, dtype, key_lengths=[9, 0, 3, 4, 5, 6], **shifts)


def mask_of(call, keep, axes=(1, 1)):
    shape = (*axes, -(-call.rows // 128), -(-call.keys // 64))
    return (torch.rand(shape, generator=call.generator) < keep).to(torch.uint8)


@pytest.mark.parametrize("d, dtype", [(64, BF16), (128, F16), (256, BF16), (32, F32)], ids=str)
@pytest.mark.parametrize("keep", [0.0, 0.4])
def test_emulated_block_mask(emulated, d, dtype, keep):
    call = Call(130, 260, d, dtype, heads=2, batch=1)
    call.args["block_mask"] = mask_of(call, keep, (1, 2))
    assert_close(call, *call.run(emulated))


def test_emulated_blocks_that_are_hidden_are_not_read(emulated):
    call = Call(128, 64 * 40, 64, BF16)
    call.args["block_mask"] = torch.zeros(1, 1, 1, 40, dtype=torch.uint8)
    call.of("block_mask")[..., [3, 36, 37]] = 1
    assert_close(call, *call.run(emulated))
    _, _, q, k, v, _ = emulated.traffic()
    tile = 64 * 64 * 2
    assert k.reads == v.reads == {16: 3 * tile // 16}
    assert q.reads == {16: 2 * tile // 16}


@pytest.mark.parametrize("layout", ["bhld", "blhd", "qkv"])
def test_emulated_tokens_are_read_by_16_bytes(emulated, layout):
    Call(128, 128, 72, BF16, heads=2, layout=layout).run(emulated)
    _, _, *tokens = emulated.traffic()
    assert [t.reads for t in tokens] == [{16: 2 * 128 * 72 * 2 // 16}] * 3


Q_LENGTHS, K_LENGTHS = [5, 0, 130, 64, 1], [65, 3, 70, 0, 128]


@every_dtype
def test_emulated_packed_sequences(emulated, dtype):
    check(emulated, dtype=dtype, d=32, heads=2, kv_heads=1, q_lengths=Q_LENGTHS, k_lengths=K_LENGTHS)


@pytest.mark.parametrize("precision", ["full", "int8", "fp8", "auto"])
def test_emulated_sequences_do_not_depend_on_their_company(emulated, precision):
    """The same bits packed, alone, and padded in a batch of others."""
    packed = Call(d=64, heads=2, kv_heads=1, q_lengths=Q_LENGTHS, k_lengths=K_LENGTHS, precision=precision)
    out, lse = packed.run(emulated)
    starts = [packed.of(name).tolist() for name in ("q_starts", "k_starts")]
    for i, (rows, keys) in enumerate(zip(Q_LENGTHS, K_LENGTHS, strict=True)):
        if not rows:
            continue
        alone = Call(rows, keys, 64, heads=2, kv_heads=1, precision=precision)
        padded = Call(rows, keys + 70, 64, heads=2, kv_heads=1, precision=precision, batch=2, seed=i)
        padded.args["key_lengths"] = torch.tensor([keys + 7, keys], dtype=torch.int32)
        for name, at in zip("qkv", (0, 1, 1), strict=True):
            tokens = packed.of(name)[:, :, starts[at][i] : starts[at][i + 1]]
            alone.args[name] = tokens.contiguous()
            padded.of(name)[1, :, : tokens.shape[2]] = tokens[0]
            padded.of(name)[1, :, tokens.shape[2] :] = 1e4
        mine = slice(starts[0][i], starts[0][i + 1])
        for call, sample in ((alone, 0), (padded, 1)):
            other, other_lse = call.run(emulated)
            assert torch.equal(other[sample], out[0, :, mine])
            assert torch.equal(other_lse[sample], lse[0, :, mine])


@every_precision
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_emulated_nan_stays_in_the_rows_that_see_it(emulated, dtype, precision):
    call = Call(70, 130, 64, dtype, batch=3, precision=precision)
    call.of("q")[0, 0, 66, 3] = torch.nan
    call.of("k")[1, 0, 129, 5] = torch.nan
    call.of("v")[2, 0, 2, 7] = torch.nan
    out, lse = call.run(emulated)
    bad = torch.zeros(3, 70, dtype=torch.bool)
    bad[0, 66] = bad[1] = True
    assert torch.equal(lse[:2, 0].isnan(), bad[:2])
    assert torch.equal(out[:2, 0].isnan().all(-1), bad[:2]) and torch.equal(
        out[:2, 0].isnan().any(-1), bad[:2]
    )
    if precision == "full":  # its channel alone
        assert out[2, 0, :, 7].isnan().all() and out[2].isnan().sum() == 70
    else:
        assert out[2].isnan().all()


@every_precision
def test_emulated_lengths_out_of_range(emulated, precision):
    """Results are NaN, and nothing outside of the tensors is touched."""
    call = Call(9, 70, 64, batch=3, key_lengths=[71, 70, -1], precision=precision)
    out, lse = call.run(emulated)
    assert out[[0, 2]].isnan().all() and lse[[0, 2]].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize("precision", ["full", "int8", "auto"])
@pytest.mark.parametrize("name", ["q_starts", "k_starts"])
@pytest.mark.parametrize(
    "starts", [[0, 500, 200], [1, 100, 200], [0, 100, 199], [0, -5, 200], [7, 7, 2**31 - 1]], ids=str
)
def test_emulated_starts_out_of_range(emulated, precision, name, starts):
    call = Call(d=16, q_lengths=[100, 100], k_lengths=[100, 100], precision=precision)
    call.args[name] = torch.tensor(starts, dtype=torch.int32)
    out, lse = call.run(emulated)
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("d", [40, 72, 128, 256])
def test_emulated_eight_bits(emulated, dtype, precision, d):
    check_eight_bits(emulated, rows=40, keys=130, d=d, dtype=dtype, precision=precision)


@pytest.fixture
def without_e4m3(emulated):
    emulated.set_e4m3(False)
    yield
    emulated.set_e4m3(True)


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("d", [40, 72, 128, 256])
def test_emulated_values_of_16_bits_beside_codes(emulated, without_e4m3, dtype, d):
    check_eight_bits(emulated, rows=40, keys=130, d=d, dtype=dtype, precision="fp8", limit=1.2e-2)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_emulated_eight_bits_with_everything(emulated, precision):
    every = {"precision": precision, "rows": 40, "keys": 130, "d": 64}
    check_eight_bits(
        emulated, heads=4, kv_heads=2, layout="qkv" if precision == "int8" else "blhd", **every | {"keys": 40}
    )
    check_eight_bits(emulated, bias=(1, 1, 40), bias_dtype=F32, **every)
    check_eight_bits(emulated, bias=(1, 1, 1), bias_dtype=BF16, **every)
    check_eight_bits(emulated, factor=1, limit=1.5e-2, **every)
    check_eight_bits(emulated, factor=1, limit=1.5e-2, dtype=F32, **every)
    check_eight_bits(emulated, batch=3, key_lengths=[0, 64, 129], **every)
    check_eight_bits(emulated, batch=4, frames=2, heads=2, head_shift=[1, -1], **every | {"keys": 50})
    check_eight_bits(emulated, scale=-0.1, **every)
    call = Call(130, 260, 64, precision=precision)
    call.args["block_mask"] = mask_of(call, 0.5)
    error, _ = similarity(call.run(emulated)[0], call.true()[0])
    assert error < LIMIT[precision]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_emulated_offset_and_outlier_channels_of_keys(emulated, precision):
    """The mean of the keys is subtracted: without that nothing is left of them."""
    for offset, given in ((20, False), (200, True)):
        call = Call(40, 600, 64, F32, heads=2, kv_heads=1, precision=precision, offset=offset, outliers=4)
        if given:
            call.args["key_mean"] = call.of("k").float().mean(2) + 0.1
        out, _ = call.run(emulated)
        assert similarity(out, call.true()[0])[1] >= 0.998
    call.args["key_mean"] = torch.zeros(1, 1, 64)
    assert similarity(call.run(emulated)[0], call.true()[0])[1] < 0.99


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_emulated_auto(emulated, dtype):
    """Heads of which eight bits would be too wrong are computed in full; the others have the bits of int8."""
    call = Call(40, 130, 64, dtype, batch=2, heads=2, kv_heads=2, precision="auto")
    call.of("q")[1, 0] *= 20
    out, lse = call.run(emulated)
    assert call.fell_back.tolist() == [[0, 0], [1, 0]]
    for precision, chosen in (("int8", call.fell_back == 0), ("full", call.fell_back == 1)):
        call.precision = precision
        other, other_lse = call.run(emulated)
        assert torch.equal(out[chosen], other[chosen]) and torch.equal(lse[chosen], other_lse[chosen])


def test_emulated_results_are_the_same_in_every_order(emulated):
    calls = [Call(70, 130, 64, heads=2, precision=p) for p in ("full", "auto")] + [Call(40, 70, 64, F32)]
    results = []
    for seed in (1, 2, 3):
        emulated.set_seed(seed)
        results.append([call.run(emulated) for call in calls])
    emulated.set_seed(0)
    for other in results[1:]:
        for (out, lse), (same, same_lse) in zip(results[0], other, strict=True):
            assert torch.equal(out, same) and torch.equal(lse, same_lse)
