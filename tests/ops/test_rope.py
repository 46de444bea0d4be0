"""What `rfkernels.ops.rope` promises: its definition, its roundings, its layouts, its refusals."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rfkernels import ops
from tests.ops.cases import BF16, F16, F32, F64, KERNELS, TOLERANCE, every_device, every_kernel
from tests.ops.rope_calls import Make, arguments, reference, run

# heads, kv_heads, d: one pair; a lane and a part of one; the head dims of models; grouped queries
HEADS = [(1, 1, 2), (3, 3, 6), (2, 1, 18), (4, 2, 64), (3, 1, 72), (2, 2, 96), (6, 2, 128), (2, 1, 256)]


def assert_close(results, expected, dtype):
    tolerance = TOLERANCE[dtype]
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=4 * tolerance)


def assert_same_bits(results, expected):
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours, theirs)


def inputs(make, batch, tokens, heads, kv_heads, d):
    options = {"kv_heads": kv_heads, "q_weight": make.weight(d), "k_weight": make.weight(d)}
    return make.normal(batch, tokens, (heads + 2 * kv_heads) * d), options


@every_kernel
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("heads, kv_heads, d", HEADS)
def test_matches_reference(heads, kv_heads, d, dtype, layout, device):
    make = Make(dtype, device)
    qkv, options = inputs(make, 2, 5, heads, kv_heads, d)
    options |= {"rotation": make.rotation(3, d=d), "rotate_from": 1, "layout": layout}
    assert_close(run(device, qkv, heads, **options), reference(qkv, heads, **options), dtype)


@every_kernel
@pytest.mark.parametrize("norm", ["both", "q", "none"])
@pytest.mark.parametrize("rotated", [True, False])
def test_norm_and_rotation_may_be_absent(norm, rotated, device):
    make = Make(F64, device)
    qkv, options = inputs(make, 2, 40, 4, 2, 24)
    options["q_weight"] = None if norm == "none" else options["q_weight"]
    options["k_weight"] = options["k_weight"] if norm == "both" else None
    options["rotation"] = make.rotation(40, d=24) if rotated else None
    assert_close(run(device, qkv, 4, **options), reference(qkv, 4, **options), F64)


@every_kernel
@pytest.mark.parametrize("weights", ["own dtype", F32], ids=str)
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_fast_rounds_once(dtype, weights, device):
    # float32 tokens of the same values give the result before its rounding: to the bit.
    make = Make(dtype, device)
    qkv, options = inputs(make, 1, 7, 3, 3, 64)
    if weights == F32:
        options |= {"q_weight": make.weight(64, F32), "k_weight": make.weight(64, F32)}
    options["rotation"] = make.rotation(7, d=64)
    wide = options | {name: options[name].float() for name in ("q_weight", "k_weight")}
    rounded = [t.to(dtype) for t in run(device, qkv.float(), 3, **wide)]
    assert_same_bits(run(device, qkv, 3, **options), rounded)


@every_kernel
@pytest.mark.parametrize("weights", ["own dtype", F32], ids=str)
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("tier", ["exact", "exact_before_weight"])
def test_exact_tiers_round_where_eager_does(tier, dtype, weights, device):
    # All but one in a thousand to the bit: the last bit of the mean square depends on the order of its sum.
    make = Make(dtype, device)
    qkv, options = inputs(make, 1, 40, 4, 4, 64)
    if weights == F32:
        options |= {"q_weight": make.weight(64, F32), "k_weight": make.weight(64, F32)}
    options |= {"rotation": make.rotation(40, d=64), "tier": tier}
    eager = ops.qkv_norm_rope_reference(*arguments(qkv, 4, **options))
    ours = run(device, qkv, 4, **options)
    fast = run(device, qkv, 4, **(options | {"tier": "fast"}))
    for x, y, z in zip(ours[:2], eager, fast, strict=False):
        assert (x != y).double().mean() <= 1e-3
        if tier == "exact" or weights != F32:
            assert (x != z).double().mean() > 0.05  # fast is another function
    assert torch.equal(ours[2], eager[2])


@every_kernel
@pytest.mark.parametrize("form", ["fused", "apart", "split", "mixed"])
@pytest.mark.parametrize("text", ["first", "last"])
@pytest.mark.parametrize("rotate", ["all", "image"])
def test_streams_lie_one_after_the_other(form, text, rotate, device):
    make, d = Make(F32, device), 16
    image, text_tokens = make.normal(2, 9, 8 * d), make.normal(2, 4, 8 * d)
    streams = [text_tokens, image] if text == "first" else [image, text_tokens]
    q_weights, k_weights = [make.weight(d), make.weight(d)], [make.weight(d), None]
    rows, start = (13, 0) if rotate == "all" else (9, 4 if text == "first" else 0)
    rotation = make.rotation(rows, d=d)
    options = {"kv_heads": 2, "q_weight": q_weights, "k_weight": k_weights}
    given = [in_form(s, form if form != "mixed" else ("fused", "apart")[i], d) for i, s in enumerate(streams)]
    joint = run(device, given, 4, rotation=rotation, rotate_from=start, **options)
    assert_close(joint, reference(streams, 4, rotation=rotation, rotate_from=start, **options), F32)

    begin = 0
    for i, stream in enumerate(streams):  # each alone gives the same bits
        length = stream.shape[1]
        first, end = max(start, begin), min(start + rows, begin + length)
        mine = rotation[first - start : end - start] if end > first else None
        alone = {"kv_heads": 2, "q_weight": q_weights[i], "k_weight": k_weights[i], "rotation": mine}
        alone["rotate_from"] = first - begin if end > first else 0
        assert_same_bits([t[:, begin : begin + length] for t in joint], run(device, stream, 4, **alone))
        begin += length


def in_form(stream, form, d):
    if form == "fused":
        return stream
    parts = stream.split([4 * d, 2 * d, 2 * d], -1)
    return tuple(parts) if form == "apart" else tuple(p.unflatten(-1, (-1, d)) for p in parts)


@every_kernel
@pytest.mark.parametrize("tier", ["fast", "exact"])
@pytest.mark.parametrize("streams", [1, 2])
def test_values_may_be_left_out(streams, tier, device):
    make, d = Make(BF16, device), 64
    given = [make.normal(2, 9, 8 * d) for _ in range(streams)]
    options = {"kv_heads": 2, "q_weight": make.weight(d), "rotation": make.rotation(9 * streams, d=d)}
    q, k, v = run(device, given, 4, with_v=False, tier=tier, **options)
    assert v.shape == (0,)
    assert_same_bits((q, k), run(device, given, 4, tier=tier, **options)[:2])


@every_device
@pytest.mark.parametrize("form", ["fused", "apart", "split", "listed"])
def test_values_of_one_stream_are_a_view(form, device):
    make, d = Make(BF16, device), 64
    wide = make.normal(2, 9, 8 * d + 40)
    qkv = wide[..., : 8 * d]
    options = {"kv_heads": 2, "q_weight": make.weight(d), "rotation": make.rotation(9, d=d)}
    given = [qkv] if form == "listed" else in_form(qkv, form, d)
    into = [torch.empty(2, 9, n, d, dtype=BF16, device=wide.device) for n in (4, 2, 2)]
    expected = ops.qkv_norm_rope(given, 4, out=tuple(into), **options)
    results = ops.qkv_norm_rope(given, 4, **options)
    assert_same_bits(results, expected)
    assert results[2].data_ptr() == wide[..., 6 * d :].data_ptr()
    storages = {t.untyped_storage().data_ptr() for t in (*results, wide)}
    assert len(storages) == 3  # q and k are their own
    wide.requires_grad_()
    with torch.no_grad():
        v = ops.qkv_norm_rope(in_form(wide[..., : 8 * d], "fused", d), 4, **options)[2]
    assert v.untyped_storage().data_ptr() in storages and not v.requires_grad


@every_device
@pytest.mark.parametrize("why", ["gradient", "gradient of a weight", "streams", "layout", "out"])
def test_values_are_copied_otherwise(why, device):
    make, d = Make(F32, device), 16
    qkv, options = inputs(make, 2, 5, 4, 2, d)
    given = [qkv, qkv] if why == "streams" else qkv
    options["layout"] = "bhld" if why == "layout" else "blhd"
    if why == "gradient of a weight":
        options["q_weight"].requires_grad_()
    if why == "gradient":
        given = qkv.clone().requires_grad_()
    out = tuple(torch.empty_like(t) for t in ops.qkv_norm_rope(given, 4, **options)) if why == "out" else None
    v = ops.qkv_norm_rope(given, 4, out=out, **options)[2]
    base = given if why == "gradient" else qkv
    assert v.untyped_storage().data_ptr() != base.untyped_storage().data_ptr()
    assert v.requires_grad == ("gradient" in why)


@every_kernel
def test_one_weight_serves_all_streams_and_four_streams_fit(device):
    make = Make(F32, device)
    streams = [make.normal(1, n, 3 * 2 * 8) for n in (1, 2, 3, 4)]
    w = make.weight(8)
    joint = run(device, streams, 2, q_weight=w, k_weight=w)
    assert_same_bits(joint, run(device, torch.cat(streams, 1), 2, q_weight=w, k_weight=w))
    with pytest.raises(ValueError, match=r"expected 1\.\.4 streams, got 5"):
        run(device, [*streams, streams[0]], 2)


@every_kernel
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_tokens_may_lie_in_a_wider_buffer(offset, dtype, device):
    # As in one projection to [qkv, mlp]; offset 1 cannot be read in 16-byte packs.
    make, d, heads = Make(dtype, device), 32, 2
    wide = make.normal(2, 12, offset + 3 * heads * d + 40)
    qkv = wide[:, 1::2, offset : offset + 3 * heads * d]
    options = {"q_weight": make.weight(d), "k_weight": make.weight(d), "rotation": make.rotation(6, d=d)}
    expected = run(device, qkv.contiguous(), heads, **options)
    assert_same_bits(run(device, qkv, heads, **options), expected)
    backwards = torch.stack([qkv[1], qkv[0]]).transpose(0, 1).contiguous().transpose(0, 1)  # batch strides
    assert_same_bits([t.flip(0) for t in run(device, backwards, heads, **options)], expected)


@every_kernel
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_weights_and_rotation_may_start_anywhere(offset, device):
    make, d = Make(F32, device), 64
    qkv = make.normal(1, 6, 3 * 2 * d)
    w, rotation = make.weight(d), make.rotation(6, d=d)
    expected = run(device, qkv, 2, q_weight=w, k_weight=w, rotation=rotation)
    w = torch.cat([w.new_zeros(offset), w])[offset:]
    rows = torch.cat([w.new_zeros(6, offset), rotation.flatten(1), w.new_zeros(6, 3)], 1)
    rotation = rows[:, offset : offset + d].unflatten(-1, (-1, 2))
    assert_same_bits(run(device, qkv, 2, q_weight=w, k_weight=w, rotation=rotation), expected)


@every_kernel
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_out_goes_through_strides(layout, device):
    # The three results in one buffer [batch, tokens, 3 heads, d], larger than what is asked for.
    make, d = Make(BF16, device), 64
    qkv, options = inputs(make, 2, 6, 2, 2, d)
    options |= {"rotation": make.rotation(6, d=d), "layout": layout}
    expected = run(device, qkv, 2, **options)
    buffer = torch.full((2, 9, 6, d + 8), torch.nan, dtype=BF16, device=qkv.device)
    views = [buffer[:, 2:8, 2 * i : 2 * i + 2, :d] for i in range(3)]
    views = [v.transpose(1, 2) if layout == "bhld" else v for v in views]
    run(device, qkv, 2, out=tuple(views), **options)
    assert_same_bits(views, expected)
    assert buffer.isfinite().sum() == 2 * 6 * 6 * d  # nothing beside them is written


@every_kernel
def test_rotation_may_differ_by_sample(device):
    make, d = Make(F64, device), 12
    qkv, rotation = make.normal(3, 5, 3 * 2 * d), make.rotation(3, 5, d=d)
    result = run(device, qkv, 2, rotation=rotation)
    assert_close(result, reference(qkv, 2, rotation=rotation), F64)
    for b in range(3):
        alone = run(device, qkv[b : b + 1], 2, rotation=rotation[b])
        assert_same_bits([t[b : b + 1] for t in result], alone)
    expected = run(device, qkv, 2, rotation=rotation[1])
    assert_same_bits(run(device, qkv, 2, rotation=rotation[1:2].expand(3, 5, d // 2, 2)), expected)
    assert_same_bits(run(device, qkv, 2, rotation=rotation[1:2]), expected)
    assert_same_bits(run(device, qkv, 2, rotation=tuple(rotation[1].unbind(-1))), expected)


@every_kernel
def test_scores_depend_on_distance_alone(device):
    # The property that rotary embeddings are made for: q_m k_n is a function of m - n.
    make, d = Make(F64, device), 24
    one = make.normal(1, 1, 3 * d).expand(1, 9, 3 * d)
    table = ops.rotary_table(torch.arange(9.0, device=one.device)[:, None], (d,), dtype=F64)
    q, k, v = run(device, one, 1, rotation=table, layout="bhld")
    scores = (q @ k.mT)[0, 0]
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    torch.testing.assert_close(q.norm(dim=-1), one[0, 0, :d].norm().expand(1, 1, 9))
    assert torch.equal(v[0, 0], one[0, :, 2 * d :])


@every_kernel
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_values_keep_their_bits(dtype, device):
    # Whatever is not normalised nor rotated is copied, the payload of a NaN too.
    bits = torch.randint(-(2**15), 2**15, (1, 160, 384 * dtype.itemsize // 2), dtype=torch.int16)
    qkv = bits.view(dtype).to(Make(dtype, device).device)
    assert qkv.isnan().any()
    same = lambda x, y: torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
    for which, result in enumerate(run(device, qkv, 2)):
        assert same(result.flatten(2), qkv[..., 128 * which : 128 * (which + 1)])


@every_kernel
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_nan_and_infinity_stay_in_their_vector(dtype, device):
    make, d = Make(dtype, device), 64
    qkv, options = inputs(make, 1, 6, 2, 2, d)
    options["rotation"] = make.rotation(6, d=d)
    expected = run(device, qkv, 2, **options)
    qkv[0, 1, 5], qkv[0, 3, d + 7], qkv[0, 4, 4 * d] = torch.nan, torch.inf, -torch.inf
    q, k, v = run(device, qkv, 2, **options)
    assert q[0, 1, 0].isnan().all() and q[0, 3, 1].isnan().any() and v[0, 4, 0, 0] == -torch.inf
    expected[0][0, 1, 0], expected[0][0, 3, 1], expected[2][0, 4, 0, 0] = q[0, 1, 0], q[0, 3, 1], -torch.inf
    for ours, theirs in zip((q, k, v), expected, strict=True):
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


@every_kernel
@pytest.mark.parametrize("batch, tokens", [(0, 5), (2, 0)])
def test_nothing_gives_nothing(batch, tokens, device):
    make = Make(F32, device)
    qkv, options = inputs(make, batch, tokens, 2, 1, 8)
    q, k, v = run(device, qkv, 2, rotation=make.rotation(tokens, d=8), **options)
    assert q.shape == (batch, tokens, 2, 8) and k.shape == v.shape == (batch, tokens, 1, 8)
    full = make.normal(2, 3, 32)
    if tokens == 0:  # an empty stream beside others
        assert_same_bits(run(device, [qkv, full, qkv], 2, **options), run(device, full, 2, **options))


@every_kernel
def test_offsets_beyond_2_31_elements(device):
    # Samples 2^31 + 64 elements apart: memory of which only the pages that are touched come to be.
    apart, d = 2**31 + 64, 64
    make = Make(BF16, device)
    dense = make.normal(2, 3, 3 * d)
    space = torch.empty(apart + 3 * 3 * d, dtype=BF16, device=dense.device)
    qkv = space.as_strided(dense.shape, (apart, 3 * d, 1))
    qkv.copy_(dense)
    results = [torch.empty(apart + 3 * d, dtype=BF16, device=dense.device) for _ in range(3)]
    out = tuple(t.as_strided((2, 3, 1, d), (apart, d, d, 1)) for t in results)
    options = {"q_weight": make.weight(d), "k_weight": make.weight(d), "rotation": make.rotation(3, d=d)}
    run(device, qkv, 1, out=out, **options)
    assert_same_bits(out, run(device, dense, 1, **options))


@every_device
def test_large_results_are_written_past_the_caches(device):
    # More than 4 MiB; a result that is not aligned goes the other way.
    make, d = Make(BF16, device), 64
    qkv, options = inputs(make, 1, 1500, 10, 10, d)
    options["rotation"] = make.rotation(1500, d=d)
    results = run(device, qkv, 10, **options)
    assert_close(results, reference(qkv, 10, **options), BF16)
    shifted = [torch.empty(t.numel() + 1, dtype=BF16, device=t.device)[1:].view(t.shape) for t in results]
    run(device, qkv, 10, out=tuple(shifted), **options)
    assert_same_bits(shifted, results)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_matches_reference_fuzzed(kernel, data):
    draw = lambda strategy: data.draw(strategy)
    dtype = draw(st.sampled_from([F64, F32, F16, BF16]))
    make = Make(dtype, kernel, seed=draw(st.integers(0, 1000)))
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, d, batch = kv_heads * groups, 2 * draw(st.integers(1, 128)), draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    streams = []
    for length in lengths:
        width, before, behind = (heads + 2 * kv_heads) * d, draw(st.integers(0, 9)), draw(st.integers(0, 9))
        wide = make.normal(batch, length, before + width + behind)
        streams.append(wide[..., before : before + width])
    options = {"kv_heads": kv_heads, "layout": draw(st.sampled_from(["bhld", "blhd"]))}
    mixed = dtype in (F16, BF16) and draw(st.booleans())
    for name in ("q_weight", "k_weight"):
        weights = [make.weight(d, F32 if mixed else None) if draw(st.booleans()) else None for _ in lengths]
        options[name] = weights
    if draw(st.booleans()):
        start = draw(st.integers(0, sum(lengths)))
        rows = draw(st.integers(0, sum(lengths) - start))
        lead = draw(st.sampled_from([(), (batch,), (1,)]))
        options |= {"rotation": make.rotation(*lead, rows, d=d), "rotate_from": start}
    assert_close(run(kernel, streams, heads, **options), reference(streams, heads, **options), dtype)
