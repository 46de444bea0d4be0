"""The CUDA kernels, run on the CPU, give the bits of the CPU kernels."""

import pytest
import torch

from rfkernels import ops
from tests.emulator.build import ROOT
from tests.ops.cases import BF16, DTYPES, F16, F32, F64, ROWS, SHAPES, VIDEO, Make, every_case


def assert_same_bits(emulated, case, make):
    args = case.inputs(make)
    expected = case.op(*args)
    out = torch.full_like(expected, torch.nan)
    if out.numel():  # the checking half returns before the launch
        getattr(emulated, case.name)(out, *args)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (4, 1024), (2, 5, 64)], ids=str)
@every_case
def test_kernel_gives_the_bits_of_the_cpu(emulated, case, shape, dtypes):
    assert_same_bits(emulated, case, Make(shape, *dtypes, "cpu"))


@pytest.mark.parametrize("dtypes", [(F64, F64), (F32, BF16)], ids=str)
@pytest.mark.parametrize("rows", ROWS, ids=str)
@every_case
def test_kernel_reads_row_scalars_of_every_shape(emulated, case, rows, dtypes):
    assert_same_bits(emulated, case, Make(VIDEO, *dtypes, "cpu", rows))


@every_case
def test_kernel_takes_the_unaligned_path(emulated, case):
    # Tensors that start one element past a 16-byte boundary cannot be read in packs.
    args = case.inputs(Make((2, 1024), F32, F32, "cpu"))
    expected = case.op(*args)
    shifted = torch.empty(2 * 1024 + 1)[1:].view(2, 1024)
    assert shifted.data_ptr() % 16 != 0
    getattr(emulated, case.name)(shifted, *args)
    assert torch.equal(shifted, expected)


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 7), (3, 5, 1001)], ids=str)
def test_noise_kernel_gives_the_bits_of_the_cpu(emulated, shape, dtype):
    keys = ops.noise_keys(2**40 + 17, shape[0], step=9)
    out = torch.full(shape, torch.nan, dtype=dtype)
    emulated.philox_normal(out, keys)
    assert torch.equal(out, ops.philox_normal(shape, keys, dtype=dtype))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 7), (3, 1001), (4, 1024)], ids=str)
@pytest.mark.parametrize(
    ("grid", "dtype"),
    [
        ("bf16", BF16),
        ("f16", F16),
        ("e4m3", torch.float8_e4m3fn),
        ("e5m2", torch.float8_e5m2),
        ("int8", torch.int8),
        ("uint8", torch.uint8),
    ],
)
def test_emulated_rounding_gives_the_bits_of_the_cpu(emulated, grid, dtype, shape, scaled):
    make = Make(shape, F32, F32, "cpu")
    x, scale = make.x * 10, 0.01 + make.tensor((shape[0], 1), F32).abs() if scaled else None
    out = torch.full(shape, 99.0).to(dtype)
    bits = torch.int16 if dtype.itemsize == 2 else torch.uint8
    emulated.stochastic_round(out.view(torch.uint8) if grid[0] == "e" else out, x, scale, 2**40 + 17, grid)
    expected = ops.stochastic_round(x, dtype, seed=2**40 + 17, scale=scale)
    assert torch.equal(out.view(bits), expected.view(bits))


def test_every_cuda_file_has_run_somewhere(emulated):
    # An op whose CUDA half is not bound in tests/emulator/module.cpp has run nowhere; one for Hopper alone
    # cannot run here and needs a record of a GPU run that names its file.
    assert set(ops.OPS) <= set(dir(emulated))
    here, hopper = set(), set()
    for path in ROOT.glob("csrc/*/*.cu"):
        (hopper if path.stem.endswith("_sm90") else here).add(path.stem)
    parts = {f"linear_{part}" for part in ("bf16", "f16", "fma", "fp8", "int8", "rows")}
    kinds = ("bf16", "f16", "fma", "int8", "int8_bf16", "int8_f16", "e4m3", "quantize")
    parts |= {f"attention_{part}" for part in kinds} | {"grouped_fma", "grouped_mma"}
    assert here <= set(ops.OPS) | {"noise", "ada_norm"} | parts  # files of several ops, and parts of one
    records = "".join(p.read_text() for p in ROOT.glob("bench/results/*.md"))
    assert not [stem for stem in hopper if stem not in records]
