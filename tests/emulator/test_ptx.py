"""The emulated PTX follows the PTX ISA: layouts of fragments, products, loads, bits.

A 32-bit register is an int64 element here. For mma, `lane // 4` is the ISA's groupID and `lane % 4` its
threadID_in_group.
"""

import math

import pytest
import torch

F8 = torch.float8_e4m3fn
FORMATS = {"f16": torch.float16, "bf16": torch.bfloat16, "s8": torch.int8, "u8s8": torch.int8, "e4m3": F8}
INTEGERS = ("s8", "u8s8")  # in u8s8 the first operand is uint8
MASK = 2**32 - 1
every_format = pytest.mark.parametrize("format", FORMATS)


# PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "... for mma.m16n8k32", written
# out: for lane 4 g + t, the (row, column) of every element, register by register, low bits first.
def a_places(format, g, t):
    if format in ("f16", "bf16"):
        return [
            *[(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)],  # a0 .. a3
            *[(g, 2 * t + 8), (g, 2 * t + 9), (g + 8, 2 * t + 8), (g + 8, 2 * t + 9)],  # a4 .. a7
        ]
    return [
        *[(g, 4 * t), (g, 4 * t + 1), (g, 4 * t + 2), (g, 4 * t + 3)],  # a0 .. a3
        *[(g + 8, 4 * t), (g + 8, 4 * t + 1), (g + 8, 4 * t + 2), (g + 8, 4 * t + 3)],  # a4 .. a7
        *[(g, 4 * t + 16), (g, 4 * t + 17), (g, 4 * t + 18), (g, 4 * t + 19)],  # a8 .. a11
        *[(g + 8, 4 * t + 16), (g + 8, 4 * t + 17), (g + 8, 4 * t + 18), (g + 8, 4 * t + 19)],  # a12 .. a15
    ]


def b_places(format, g, t):
    if format in ("f16", "bf16"):
        return [(2 * t, g), (2 * t + 1, g), (2 * t + 8, g), (2 * t + 9, g)]  # b0 .. b3
    return [
        *[(4 * t, g), (4 * t + 1, g), (4 * t + 2, g), (4 * t + 3, g)],  # b0 .. b3
        *[(4 * t + 16, g), (4 * t + 17, g), (4 * t + 18, g), (4 * t + 19, g)],  # b4 .. b7
    ]


def c_places(format, g, t):
    return [(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]  # c0 .. c3


def of_lanes(matrices, places, format):
    """[n, rows, cols] as every lane holds it: [n, 32, elements of a lane]."""
    lanes = [places(format, lane // 4, lane % 4) for lane in range(32)]
    rows, cols = torch.tensor(lanes).unbind(-1)
    return matrices[:, rows, cols]


def to_registers(elements):
    """Packs neighbours into 32 bits, the first in the low ones: [..., n] to int64[..., registers]."""
    return elements.contiguous().view(torch.int32).to(torch.int64) & MASK


def random_matrix(format, *shape, seed):
    generator = torch.Generator().manual_seed(seed)
    if format in INTEGERS:
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    return torch.randn(shape, generator=generator).to(FORMATS[format])


def random_operands(format, n=3):
    k = 32 // FORMATS[format].itemsize
    a, b = random_matrix(format, n, 16, k, seed=1), random_matrix(format, n, k, 8, seed=2)
    if format == "u8s8":
        a = a.view(torch.uint8)
    c = random_matrix("s8" if format in INTEGERS else "f16", n, 16, 8, seed=3)
    return a, b, c.to(torch.int64 if format in INTEGERS else torch.float32)


def mma(emulated, format, a, b, c):
    """a b + c through the fragments of the tables above."""
    fragments = [to_registers(of_lanes(a, a_places, format)), to_registers(of_lanes(b, b_places, format))]
    return mma_of_registers(emulated, format, *fragments, c)


def mma_of_registers(emulated, format, a, b, c):
    held_c = of_lanes(c, c_places, format)
    held_d = torch.zeros_like(held_c)
    emulated.test.ptx_mma_fragments(held_d, a, b, held_c, format)
    d = torch.zeros_like(c)
    of_element = of_lanes(torch.arange(16 * 8).view(1, 16, 8), c_places, format).flatten()
    d.flatten(1)[:, of_element] = held_d.flatten(1)
    return d


def assert_product(d, a, b, c):
    expected = a.double() @ b.double() + c.double()
    rtol = 0 if d.dtype == torch.int64 else 2**-23  # one rounding to float32
    torch.testing.assert_close(d.double(), expected, rtol=rtol, atol=0)


@every_format
def test_mma_is_the_product_of_the_matrices_in_the_fragments(emulated, format):
    a, b, c = random_operands(format)
    assert_product(mma(emulated, format, a, b, c), a, b, c)


@every_format
def test_one_hot_fragments_show_the_layout(emulated, format):
    # One element of one lane of A is 1, in row r and column k of the matrix; row k of B is values[k]. Then
    # row r of D is values[k] and the rest 0.
    k = 32 // FORMATS[format].itemsize
    n, per_lane = 16 * k, k // 2
    held = torch.eye(n).view(n, 32, per_lane).to(FORMATS[format])
    values = torch.cat([torch.arange(1.0, 17), -torch.arange(1.0, 17)])[:k]  # exact in every format
    b = values.view(1, k, 1).expand(n, k, 8).to(FORMATS[format])
    registers = to_registers(of_lanes(b.view(torch.int8) if format == "e4m3" else b, b_places, format))
    c = torch.zeros(n, 16, 8, dtype=torch.int64 if format in INTEGERS else torch.float32)
    d = mma_of_registers(emulated, format, to_registers(held), registers, c)
    expected = torch.zeros_like(d)
    for at in range(n):
        lane, element = divmod(at, per_lane)
        row, col = a_places(format, lane // 4, lane % 4)[element]
        expected[at, row] = values[col].to(d.dtype)
    assert torch.equal(d, expected)


@every_format
@pytest.mark.parametrize("operand", ["a", "b"])
def test_exchanged_registers_give_another_product(emulated, format, operand):
    a, b, c = random_operands(format)
    held_a, held_b = (to_registers(of_lanes(m, p, format)) for m, p in ((a, a_places), (b, b_places)))
    if operand == "a":
        held_a = held_a[..., [1, 0, 2, 3]]
    else:
        held_b = held_b[..., [1, 0]]
    d = mma_of_registers(emulated, format, held_a, held_b, c)
    with pytest.raises(AssertionError):
        assert_product(d, a, b, c)


def test_e4m3_decodes_every_byte(emulated):
    # A has the byte in column 0, B has 1 in row 0: D is the value of the byte.
    for first in range(0, 256, 16):
        a = torch.zeros(1, 16, 32, dtype=torch.uint8)
        a[0, :, 0] = torch.arange(first, first + 16)
        b = torch.zeros(1, 32, 8)
        b[0, 0] = 1
        d = mma(emulated, "e4m3", a, b.to(F8).view(torch.uint8), torch.zeros(1, 16, 8))
        expected = a[0, :, :1].view(F8).float().expand(16, 8)
        assert torch.equal(d[0].nan_to_num(nan=1e6), expected.nan_to_num(nan=1e6))


def test_s8_sums_wrap(emulated):
    a, b = torch.ones(1, 16, 32, dtype=torch.int8), torch.ones(1, 32, 8, dtype=torch.int8)
    c = torch.full((1, 16, 8), 2**31 - 1)
    assert torch.equal(mma(emulated, "s8", a, b, c), torch.full_like(c, -(2**31) + 31))


@every_format
def test_product_through_cp_async_and_ldmatrix(emulated, format):
    a, b, _ = random_operands(format, n=1)
    columns = b[0].view(torch.uint8 if format == "e4m3" else b.dtype).T.contiguous()
    d = torch.zeros(16, 8, dtype=torch.int64 if format in INTEGERS else torch.float32)
    emulated.test.ptx_mma_product(d, a[0].view(torch.int64), columns.view(torch.int64), format)
    assert_product(d, a[0], b[0], torch.zeros(16, 8))


def rows_and_order():
    """32 rows of eight 16-bit elements, and which of them each lane addresses."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(0, 2**16, (32, 8), generator=generator)
    return rows, torch.randperm(32, generator=generator)


def ldmatrix_expected(rows, order, matrices, trans):
    """PTX ISA, ldmatrix: which 16-bit elements lane l holds in register i."""
    expected = torch.zeros(32, matrices, dtype=torch.int64)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for i in range(matrices):
            matrix = rows[order[8 * i : 8 * i + 8]]
            low = matrix[2 * t, g] if trans else matrix[g, 2 * t]
            high = matrix[2 * t + 1, g] if trans else matrix[g, 2 * t + 1]
            expected[lane, i] = low + high * 2**16
    return expected


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_ldmatrix(emulated, matrices, trans):
    rows, order = rows_and_order()
    r = torch.zeros(32, matrices, dtype=torch.int64)
    emulated.test.ptx_ldmatrix(r, rows.to(torch.uint16).view(torch.int64), order, trans)
    assert torch.equal(r, ldmatrix_expected(rows, order, matrices, trans))


def test_stmatrix_undoes_ldmatrix(emulated):
    rows, order = rows_and_order()
    memory = torch.zeros(32, 2, dtype=torch.int64)
    emulated.test.ptx_stmatrix(memory, ldmatrix_expected(rows, order, 4, trans=False), order)
    assert torch.equal(memory, rows.to(torch.uint16).view(torch.int64))


@pytest.mark.parametrize("valid", [64, 40, 0])
@pytest.mark.parametrize("piece", [4, 8, 16])
def test_cp_async(emulated, piece, valid):
    source = torch.randn(64, piece // 4, generator=torch.Generator().manual_seed(5))
    out = torch.full_like(source, torch.nan)
    emulated.test.ptx_cp_async(out, source, piece, valid)
    assert torch.equal(out, torch.where(torch.arange(64)[:, None] < valid, source, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_red_add(emulated, dtype):
    # Small integers: exact in every order.
    x = torch.randint(-4, 5, (12, 6), generator=torch.Generator().manual_seed(6)).to(dtype)
    total = torch.arange(6).to(dtype)
    expected = total + x.sum(0)
    emulated.test.ptx_red_add(total, x)
    assert torch.equal(total, expected)


def test_red_add_f32_takes_subnormals_for_zero(emulated):
    total = torch.tensor([2.0**-130, 2.0**-126])
    emulated.test.ptx_red_add(total, torch.tensor([2.0**-130, -(2.0**-127)]))
    assert total.tolist() == [0.0, 2.0**-126]


def test_exp2(emulated):
    x = torch.cat([torch.linspace(-125, 127, 2017), torch.tensor([0.0, -0.5, -torch.inf, torch.inf, 200.0])])
    y = torch.zeros_like(x)
    emulated.test.ptx_exp2(y, x)
    expected = torch.tensor([math.inf if v > 128 else math.pow(2, v) for v in x.tolist()])
    torch.testing.assert_close(y, expected, rtol=2**-22, atol=0)


def test_exp2_flushes_subnormal_results(emulated):
    x = torch.tensor([-126.0, -126.5, -149.0])
    y = torch.ones_like(x)
    emulated.test.ptx_exp2(y, x)
    assert y.tolist() == [2.0**-126, 0.0, 0.0]


@pytest.mark.parametrize("format", ["f16", "bf16", "e4m3"])
def test_round_to_pair(emulated, format):
    """Two floats to nearest even, the first in the low bits; e4m3 saturates."""
    dtype = FORMATS[format]
    x = torch.randn(600, generator=torch.Generator().manual_seed(11)) * 30
    x[:8] = torch.tensor([0.0, -0.0, 1.0625, 1.1875, 449.0, -1000.0, 2.0**-9, 2.0**-10])
    d = torch.zeros(300, dtype=torch.int64)
    emulated.test.ptx_round_pair(d, x, format)
    expected = (x.clamp(-448, 448) if format == "e4m3" else x).to(dtype).view(torch.uint8)
    words = expected.view(300, -1).long()
    assert torch.equal(d, (words << 8 * torch.arange(words.shape[1])).sum(1))


def words(n, seed):
    return torch.randint(0, 2**32, (n,), generator=torch.Generator().manual_seed(seed))


def prmt(a, b, selector):
    """PTX ISA, prmt, default mode."""
    sources = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    picked = []
    for i in range(4):
        choice = selector >> (4 * i) & 15
        byte = sources[choice & 7]
        picked.append(byte if choice < 8 else 0xFF if byte >= 0x80 else 0)
    return int.from_bytes(bytes(picked), "little")


def test_byte_permute(emulated):
    a, b = words(500, 7), words(500, 8)
    selector = torch.cat([torch.tensor([0x3210, 0x7654, 0x0123, 0x5410, 0x7632, 0xFEDC]), words(494, 9)])
    d = torch.zeros(500, dtype=torch.int64)
    emulated.test.ptx_byte_permute(d, a, b, selector)
    assert d.tolist() == [prmt(*v) for v in zip(a.tolist(), b.tolist(), selector.tolist(), strict=True)]


def lop3(table, a, b, c):
    """PTX ISA, lop3: every bit is the entry of the table that the three bits number."""
    index = lambda i: (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)
    return sum((table >> index(i) & 1) << i for i in range(32))


def test_lop3(emulated):
    a, b, c = words(4, 10), words(4, 11), words(4, 12)
    d = torch.zeros(256, 4, dtype=torch.int64)
    emulated.test.ptx_lop3(d, a, b, c)
    of_words = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
    assert d.tolist() == [[lop3(table, *abc) for abc in of_words] for table in range(256)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fma_of_pairs_rounds_once(emulated, dtype):
    generator = torch.Generator().manual_seed(13)
    bits = torch.randint(-(2**15), 2**15, (3, 20000), generator=generator).to(torch.int16)
    close = torch.randn(3, 20000, generator=generator).to(dtype).view(torch.int16)
    a, b, c = torch.cat([bits, close], 1).view(dtype)
    packed = [v.view(torch.int16).view(torch.int32).to(torch.int64) & MASK for v in (a, b, c)]
    d = torch.zeros(20000, dtype=torch.int64)
    emulated.test.ptx_fma_pair(d, *packed, dtype == torch.bfloat16)
    out = d.to(torch.int32).view(dtype).double()
    exact = a.double() * b.double() + c.double()
    expected = exact.to(dtype).double()
    assert torch.equal(out.isnan(), expected.isnan())
    finite = expected.isfinite() & out.isfinite()
    assert torch.equal(out[~finite & ~out.isnan()], expected[~finite & ~out.isnan()])
    # torch goes through float: where that rounds twice, one of the two nearest numbers is as good
    nearer = (out - exact).abs() <= (expected - exact).abs()
    assert nearer[finite].all()
    assert (out == expected)[finite].double().mean() > 0.999
