"""`rfkernels.explain()`: true, complete, and helpful when things are broken."""

import importlib
import json
import shutil
import sys

import pytest
import torch

import rfkernels
from rfkernels import diagnosis

BUILD = {
    "version": "0.1.0",
    "compiler": "13.1",
    "cuda": "13.0",
    "cuda_archs": ["80", "90", "90a"],
    "cpu_features": {"avx2": True, "amx_bf16": False},
    "cpu_isa": "x86-64-v3",
}


@pytest.fixture
def build(monkeypatch):
    """The compiled library says BUILD about itself."""
    from rfkernels import _C

    monkeypatch.setattr(_C, "build_info", lambda: BUILD, raising=True)


def gpu(monkeypatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")


def problems(report: dict, level: str) -> str:
    return "\n".join(f"{p['problem']} -> {p['fix']}" for p in report["problems"] if p["level"] == level)


def test_report_is_json_and_text():
    report = rfkernels.explain()
    assert json.loads(json.dumps(report)) == dict(report)
    text = str(report)
    assert torch.__version__ in text and "\x1b" not in text
    assert all(row["op"] in text for row in report["ops"])


def test_every_op_has_a_row_that_says_where_it_runs():
    from rfkernels.ops import OPS

    report = rfkernels.explain()
    assert {row["op"] for row in report["ops"]} == set(OPS) and len(OPS) >= 6
    assert all(report["cpu"]["isa"] in row["cpu"] and row["cuda"] for row in report["ops"])


def test_table_of_torch_is_reported_as_it_is(monkeypatch):
    has = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert rfkernels.explain()["torch"]["dlpack_c_table"] is has
    if has:
        monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
        report = rfkernels.explain()
        assert "no DLPack C table" in problems(report, "hint") and "__dlpack__ calls" in str(report)


@pytest.mark.parametrize(
    ("capability", "archs", "code"),
    [
        ((8, 0), ["80", "90"], "80"),
        ((8, 6), ["80", "90"], "80"),
        ((8, 9), ["80", "86", "90"], "86"),
        ((8, 7), ["80", "86"], "86+PTX"),
        ((8, 7), ["80", "87"], "87"),
        ((9, 0), ["80", "90", "90a"], "90a"),
        ((9, 0), ["80"], None),
        ((10, 0), ["80", "90", "90a", "120"], "90+PTX"),
        ((10, 0), ["90a"], None),
        ((7, 5), ["80", "90"], None),
        ((12, 1), ["90", "120"], "120"),
        ((8, 0), [], None),
    ],
)
def test_cuda_coverage_follows_the_driver(capability, archs, code):
    assert diagnosis.cuda_coverage(capability, archs) == code


def test_a_covered_gpu_runs_the_kernels(monkeypatch, build):
    gpu(monkeypatch, (9, 0))
    report = rfkernels.explain()
    assert report["devices"] == [{"device": "cuda:0", "name": "a GPU", "sm": "90", "built_arch": "90a"}]
    assert {row["cuda"] for row in report["ops"]} == {"cuda:0 sm_90a kernel"}


def test_attention_says_who_runs_it_and_what_auto_decided(monkeypatch, build):
    from rfkernels import ops
    from rfkernels.ops import _attention

    _attention.fallbacks.clear()
    assert "none with auto yet" in str(rfkernels.explain())
    q = torch.randn(1, 3, 40, 64, generator=torch.Generator().manual_seed(0))
    q[:, 1] *= 30
    ops.attention(q, q, q, precision="auto")
    gpu(monkeypatch, (9, 0))
    report = rfkernels.explain()["attention"]
    assert report["delegated"] == "plain 16-bit calls on cuda:0: torch (cuDNN)"
    assert (report["auto_calls"], report["auto_heads"], report["auto_heads_in_full"]) == (1, 3, 1)
    gpu(monkeypatch, (8, 9))
    assert rfkernels.explain()["attention"]["delegated"] == "none"
    assert "1 of 3 heads fell back to full precision" in str(rfkernels.explain())


def test_a_gpu_that_is_not_covered_comes_with_its_fix(monkeypatch, build):
    gpu(monkeypatch, (7, 5))
    report = rfkernels.explain()
    assert "sm_75" in problems(report, "error") and "RFK_CUDA_ARCHS=75" in problems(report, "error")
    assert {row["cuda"] for row in report["ops"]} == {"cuda:0 no: sm_75 not built"}


def test_a_gpu_without_cuda_kernels_comes_with_its_fix(monkeypatch, build):
    gpu(monkeypatch, (9, 0))
    monkeypatch.setitem(BUILD, "cuda", None)
    assert "built without CUDA -> with nvcc" in problems(rfkernels.explain(), "error")


def test_works_when_the_kernels_do_not_load(monkeypatch):
    def broken(name, package=None):
        if name == "rfkernels._C":
            raise ImportError("libgomp.so.1: cannot open\nshared object file")
        return original(name, package)

    original = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", broken)
    report = rfkernels.explain()
    assert report["build"] is None and report["ops"] == []
    assert "do not load: libgomp.so.1: cannot open shared object file -> pip install" in problems(
        report, "error"
    )
    assert "error: the compiled kernels" in str(report)


def test_works_when_the_kernels_were_never_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "rfkernels._C", None)  # import raises ModuleNotFoundError
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "are not installed -> pip install" in problems(rfkernels.explain(), "error")


def test_works_when_torch_does_not_load(monkeypatch):
    def broken(name, package=None):
        if name == "torch":
            raise ImportError("no torch")
        return original(name, package)

    original = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", broken)
    report = rfkernels.explain()
    assert report["torch"] is None and "torch does not load: no torch -> pip install" in problems(
        report, "error"
    )
    assert str(report)


def test_old_torch_is_an_error_with_a_fix(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    assert "torch 2.5.1 is too old -> pip install -U" in problems(rfkernels.explain(), "error")


def test_one_thread_and_too_many_threads_are_hints(monkeypatch):
    monkeypatch.setattr(diagnosis.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert "one thread is used of 2 cores" in problems(rfkernels.explain(), "hint")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert "OMP_NUM_THREADS=2" in problems(rfkernels.explain(), "hint")


def test_missing_and_damaged_weights_come_with_their_fix(monkeypatch, tmp_path):
    monkeypatch.setattr(diagnosis, "WEIGHTS", tmp_path)
    assert "weights of the emoji model are missing" in problems(rfkernels.explain(), "error")
    (tmp_path / "emoji.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    report = rfkernels.explain()
    assert report["weights"][0]["intact"] is False and "emoji.safetensors" in problems(report, "error")
    assert "damaged" in str(report)


@pytest.mark.parametrize(
    ("cpuinfo", "fast"),
    [
        ("flags\t\t: fpu amx_bf16 avx2", True),
        ("flags : avx2 avx512_bf16_no", False),
        ("Features : fp bf16", True),
        ("", False),
    ],
)
def test_fast_bf16_is_read_from_the_cpu(monkeypatch, cpuinfo, fast):
    monkeypatch.setattr(diagnosis.Path, "read_text", lambda self, **options: cpuinfo)
    assert diagnosis.has_fast_bf16() is fast


def test_fast_bf16_is_false_where_it_cannot_be_known(monkeypatch):
    def absent(self, **options):
        raise FileNotFoundError

    monkeypatch.setattr(diagnosis.Path, "read_text", absent)
    assert diagnosis.has_fast_bf16() is False


def test_every_file_of_the_package_is_intact():
    found = {row["name"]: row["intact"] for row in rfkernels.explain()["weights"]}
    assert found.keys() >= {"emoji", "emoji-few", "lora-pixel", "lora-outline", "lora-glow"}
    assert all(found.values()), found


def test_an_adapter_that_is_none_is_reported(monkeypatch, tmp_path):
    shutil.copy(diagnosis.WEIGHTS / "emoji.safetensors", tmp_path / "emoji.safetensors")
    shutil.copy(diagnosis.WEIGHTS / "emoji.safetensors", tmp_path / "lora-oil.safetensors")
    monkeypatch.setattr(diagnosis, "WEIGHTS", tmp_path)
    report = rfkernels.explain()
    assert [row["intact"] for row in report["weights"]] == [True, False]
    assert "'rfkernels-lora' is needed" in problems(report, "error")
