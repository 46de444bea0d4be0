"""tools/compile_matrix.py finds every spill and every stack in what ptxas reports."""

import shutil

import pytest

from tools import compile_matrix
from tools.compile_matrix import Usage, main, offenders, parse, short, table

# nvcc 13.0 through c++filt: a kernel that spills and one that does not, a stack for an array indexed at run
# time, and the function that this kernel calls.
REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'void (anonymous namespace)::spill_kernel<4, rfk::f16>(rfk::f16*)' for 'sm_90'
ptxas info    : Function properties for void (anonymous namespace)::spill_kernel<4, rfk::f16>(rfk::f16*)
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 17 registers, used 1 barriers, 256 bytes smem
ptxas info    : Compile time = 3.295 ms
ptxas info    : Compiling entry function 'void (anonymous namespace)::spill_kernel<96, float>(float*)' for 'sm_90'
ptxas info    : Function properties for void (anonymous namespace)::spill_kernel<96, float>(float*)
    2384 bytes stack frame, 4176 bytes spill stores, 8284 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 2384 bytes cumulative stack size, 256 bytes smem
ptxas info    : Compile time = 616.787 ms
ptxas info    : Compiling entry function 'stack_kernel(float*, int)' for 'sm_90'
ptxas info    : Function properties for stack_kernel(float*, int)
    128 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers, 128 bytes cumulative stack size
ptxas info    : Compile time = 3.149 ms
ptxas info    : Function properties for helper(float const*, int)
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""  # noqa: E501
USAGES = [
    Usage("bad", "90", "spill_kernel<4, f16>", registers=17, shared=256),
    Usage("bad", "90", "spill_kernel<96, float>", 32, 256, stack=2384, spill_stores=4176, spill_loads=8284),
    Usage("bad", "90", "stack_kernel", registers=30, stack=128),
    Usage("bad", "90", "helper"),
]
SPILLS = """
__global__ void __launch_bounds__(1024, 2) spill_kernel(float* p) {
  float v[96], sum = 0;
#pragma unroll
  for (int i = 0; i < 96; ++i) v[i] = p[i * 1024 + threadIdx.x];
#pragma unroll
  for (int i = 0; i < 96; ++i) sum += v[i] * v[(i * 7) % 96];
#pragma unroll
  for (int i = 0; i < 96; ++i) p[i * 1024 + threadIdx.x] = v[i] + sum;
}
"""
FINE = "__global__ void fine_kernel(float* p) { p[threadIdx.x] = 1; }\n"


def test_report_is_parsed():
    assert parse("bad", REPORT) == USAGES


def test_names_are_shortened():
    inputs = "rfk::Inputs<rfk::bf16, float, rfk::AffineStep<float>::kInputs>"
    name = f"void rfk::map_rows_kernel<8, rfk::bf16, float, rfk::AffineStep<float> >(rfk::bf16*, {inputs})"
    assert short(name) == "map_rows_kernel<8, bf16, float, AffineStep<float> >"


def test_table_has_a_line_per_kernel():
    lines = [line.split() for line in table(USAGES)][1:]
    assert ["bad", "spill_kernel", "90", "2", "17-32", "256", "2384", "4176", "8284"] in lines
    assert ["bad", "stack_kernel", "90", "1", "30", "0", "128", "0", "0"] in lines
    assert len(lines) == 3


def test_spill_and_stack_are_offences_but_for_exceptions():
    spill, stack = offenders(USAGES, {})
    assert spill.startswith(
        "bad, sm_90: spill_kernel<96, float> has 2384 bytes of stack, 4176 of spill stores"
    )
    assert stack.startswith("bad, sm_90: stack_kernel has 128 bytes of stack")
    assert offenders(USAGES, {"spill_kernel": "a test"}) == [stack]
    assert offenders(USAGES, {"spill_kernel": "a test", "stack_kernel": "a test"}) == []


def test_without_nvcc_nothing_is_compiled(monkeypatch, capsys):
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert main([]) == 0
    assert capsys.readouterr().out == "matrix: no nvcc here, the kernels were not compiled\n"


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A tree of one room for the kernels of a test."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(compile_matrix, "ROOT", tmp_path)
    (tmp_path / "csrc/room").mkdir(parents=True)
    return tmp_path / "csrc/room"


def test_a_planted_spill_is_found(room, capsys):
    (room / "fine.cu").write_text(FINE)
    assert main(["--arch", "90"]) == 0
    (room / "bad_sm90.cu").write_text(SPILLS)
    assert main(["--arch", "90", "--arch", "90a"]) == 1
    offences = [line for line in capsys.readouterr().out.splitlines() if "EXCEPTIONS" in line]
    assert len(offences) == 1 and offences[0].startswith("bad_sm90, sm_90a: spill_kernel has ")


def test_reports_are_kept_until_a_header_changes(room, monkeypatch):
    (room / "fine.cu").write_text('#include "room/fine.h"\n')
    (room / "fine.h").write_text(FINE)
    compiled = []
    compile_one = compile_matrix.compile_one
    monkeypatch.setattr(compile_matrix, "compile_one", lambda *a: compiled.append(a) or compile_one(*a))
    for _ in range(2):
        assert main(["--arch", "90"]) == 0
        assert len(compiled) == 1
    (room / "fine.h").write_text(SPILLS)
    assert main(["--arch", "90"]) == 1
    assert len(compiled) == 2


def test_source_that_does_not_compile_is_an_error(room, capsys):
    (room / "broken.cu").write_text("__global__ void broken_kernel( {}\n")
    assert main(["--arch", "90"]) == 1
    assert "broken.cu, sm_90:" in capsys.readouterr().err
