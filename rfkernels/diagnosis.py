"""What was built, what this machine has, which op runs where and why, and how to fix what is wrong."""

import importlib
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Explanation", "Finding", "cuda_coverage", "explain", "has_fast_bf16"]

_REINSTALL = "pip install --force-reinstall --no-deps rfkernels (or `pip install .` in a source tree)"
_MIN_TORCH = (2, 6)
WEIGHTS = Path(__file__).parent / "weights"
MODEL = "emoji.safetensors"  # the others are adapters


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong ("error": something does not work) or slow ("hint"), and its fix."""

    level: str
    problem: str
    fix: str


class Explanation(dict[str, Any]):
    """The record of `explain()`: a plain dict for programs; `print` shows it to people."""

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def explain(obj: Any = None) -> dict[str, Any]:
    """What is built, seen and used, as a dict that `json` can write; `print(explain())` is for people.

    With a pipeline or model of diffusers: what runs in it, region by region
    (`rfkernels.integrations.report.explain_model`).

    Keys: `rfkernels`, `python`, `build` (None when the kernels cannot be loaded), `torch`, `cpu`,
    `devices`, `ops` (one row per op: where it runs and why), `attention` (who runs
    it, and what `precision="auto"` decided in the last calls), `weights`, `problems` (level, problem, fix).
    Never raises without `obj`: what cannot be found out is a problem with a fix.
    """
    if obj is not None:
        return importlib.import_module("rfkernels.integrations.report").explain_model(obj)
    findings: list[Finding] = []
    build = _build(findings)
    torch_info = _torch(findings)
    cpu = _cpu(build, torch_info, findings)
    devices = _devices(build, torch_info, findings)
    report = Explanation(
        rfkernels=importlib.import_module("rfkernels").__version__,
        python=platform.python_version(),
        build=build,
        torch=torch_info,
        cpu=cpu,
        devices=devices,
        ops=_ops(build, cpu, devices, findings),
        attention=_attention(build, devices),
        weights=_weights(torch_info, findings),
    )
    report["problems"] = [asdict(finding) for finding in findings]
    return report


def cuda_coverage(capability: tuple[int, int], archs: Sequence[str]) -> str | None:
    """The code of a build for `archs` that runs on a GPU of this compute capability, None if there is none.

    Code for 8.0 runs on 8.6 and 8.9 (same major version, newer minor one) but not on Tegra's 8.7, that for
    "90a" on 9.0 alone; the nearest is taken, as the driver does. A build for several architectures carries
    PTX too, which the driver compiles for newer GPUs: then the answer reads "80+PTX".
    """
    portable = sorted(int(arch) for arch in archs if arch.isdigit())
    mine = capability[0] * 10 + capability[1]
    if f"{mine}a" in archs:
        return f"{mine}a"
    if mine in portable:
        return str(mine)
    older = [arch for arch in portable if arch < mine]
    family = [arch for arch in older if arch // 10 == capability[0]]
    if family and mine != 87:
        return str(family[-1])
    return f"{older[-1]}+PTX" if older and len(archs) > 1 else None


def has_fast_bf16() -> bool:
    """True if this CPU multiplies bf16 matrices in hardware (AMX or AVX-512 BF16, Arm's bf16)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return flags is not None and not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(flags[1].split())


def _build(findings: list[Finding]) -> dict[str, Any] | None:
    """What the compiled library says about itself, or None and a finding that says why it is not loaded."""
    try:
        return dict(importlib.import_module("rfkernels._C").build_info())
    except Exception as error:  # whatever a broken binary raises, the report goes on
        if importlib.util.find_spec("rfkernels._C") is None:
            problem = "the compiled kernels (rfkernels._C) are not installed"
        else:
            problem = f"the compiled kernels do not load: {_one_line(error)}"
        findings.append(Finding("error", problem, _REINSTALL))
        return None


def _torch(findings: list[Finding]) -> dict[str, Any] | None:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:
        findings.append(
            Finding("error", f"torch does not load: {_one_line(error)}", "pip install 'torch>=2.6'")
        )
        return None
    table = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < _MIN_TORCH:
        findings.append(
            Finding("error", f"torch {torch.__version__} is too old", "pip install -U 'torch>=2.6'")
        )
    elif not table:
        problem = f"torch {torch.__version__} has no DLPack C table: each kernel call costs some 10 us more"
        findings.append(Finding("hint", problem, "pip install -U 'torch>=2.10'"))
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "dlpack_c_table": table,
        "threads": torch.get_num_threads(),
    }


def _cpu(build: dict | None, torch_info: dict | None, findings: list[Finding]) -> dict[str, Any]:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch_info["threads"] if torch_info else None
    if threads and threads > available:
        problem = f"{threads} threads on {available} usable cores slow each other down"
        findings.append(Finding("hint", problem, f"export OMP_NUM_THREADS={available}"))
    if threads == 1 and available > 1:
        problem = f"one thread is used of {available} cores"
        findings.append(Finding("hint", problem, "unset OMP_NUM_THREADS (or set it to the number of cores)"))
    return {
        "machine": platform.machine(),
        "isa": build["cpu_isa"] if build else None,
        "features": sorted(name for name, on in build["cpu_features"].items() if on) if build else [],
        "fast_bf16": has_fast_bf16(),
        "cores": available,
        "threads": threads,
    }


def _devices(build: dict | None, torch_info: dict | None, findings: list[Finding]) -> list[dict[str, Any]]:
    """Every CUDA device that torch sees and the built code that runs on it."""
    if torch_info is None:
        return []
    import torch

    if not torch.cuda.is_available():
        if Path("/proc/driver/nvidia/version").exists():
            problem = "an NVIDIA driver is installed, but this torch sees no GPU"
            findings.append(Finding("hint", problem, "install a torch built for CUDA (see pytorch.org)"))
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        arch = cuda_coverage(capability, build["cuda_archs"]) if build and build["cuda"] else None
        devices.append(
            {"device": f"cuda:{index}", "name": name, "sm": "{}{}".format(*capability), "built_arch": arch}
        )
        if build and not build["cuda"]:
            problem = f"{name} is not used: the kernels were built without CUDA"
            findings.append(Finding("error", problem, "with nvcc on the PATH: pip install ."))
        elif build and arch is None:
            problem = f"{name} (sm_{capability[0]}{capability[1]}) is not covered by {build['cuda_archs']}"
            fix = f"RFK_CUDA_ARCHS={capability[0]}{capability[1]} pip install . in a source tree"
            findings.append(Finding("error", problem, fix))
    return devices


def _ops(build: dict | None, cpu: dict, devices: list[dict], findings: list[Finding]) -> list[dict[str, str]]:
    """One row per op: what runs it on the CPU and on CUDA, with the reason."""
    if build is None:
        return []  # rfkernels.ops needs the kernels; the finding of `_build` says so
    try:
        names = sorted(importlib.import_module("rfkernels.ops").OPS)
    except Exception as error:
        findings.append(Finding("error", f"rfkernels.ops does not load: {_one_line(error)}", _REINSTALL))
        return []
    on_cpu = f"C++ {cpu['isa']}, {cpu['threads']} threads"
    on_cuda = _cuda_reason(build, devices)
    return [{"op": name, "cpu": on_cpu, "cuda": on_cuda} for name in names]


def _cuda_reason(build: dict, devices: list[dict]) -> str:
    if not build["cuda"]:
        return "no: built without CUDA"
    if not devices:
        return f"built (CUDA {build['cuda']}), no GPU here"
    rows = [
        f"{d['device']} sm_{d['built_arch']} kernel"
        if d["built_arch"]
        else f"{d['device']} no: sm_{d['sm']} not built"
        for d in devices
    ]
    return "; ".join(rows)


def _attention(build: dict | None, devices: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Which calls torch's attention runs, and of the last calls with "auto" how many heads fell back."""
    if build is None:
        return None
    try:
        module = importlib.import_module("rfkernels.ops._attention")
    except Exception:  # `_ops` has the finding
        return None
    flags = [flags.cpu() for flags in module.fallbacks]
    delegating = [d["device"] for d in devices if int(d["sm"]) >= 90]
    return {
        "delegated": f"plain 16-bit calls on {', '.join(delegating)}: torch (cuDNN)"
        if delegating
        else "none",
        "auto_calls": len(flags),
        "auto_heads": sum(f.numel() for f in flags),
        "auto_heads_in_full": sum(int(f.sum()) for f in flags),
    }


def _weights(torch_info: dict | None, findings: list[Finding]) -> list[dict[str, Any]]:
    """The weights files shipped with the package, each opened to see that it is whole and ours."""
    files = sorted(WEIGHTS.glob("*.safetensors"))
    if not any(file.name == MODEL for file in files):
        problem = f"the weights of the emoji model are missing in {WEIGHTS}"
        findings.append(Finding("error", problem, f"{_REINSTALL}; or train: rfkernels train emoji"))
    found = []
    for file in files:
        row: dict[str, Any] = {
            "name": file.stem,
            "path": str(file),
            "megabytes": round(file.stat().st_size / 1e6, 2),
        }
        row["intact"] = torch_info is not None and _is_intact(file, findings)
        found.append(row)
    return found


def _is_intact(file: Path, findings: list[Finding]) -> bool:
    try:
        checkpoint = importlib.import_module("rfkernels.models.checkpoint")
        read = checkpoint.read_record if file.name == MODEL else checkpoint.read_adapter_record
        read(file)
    except Exception as error:  # a damaged file, or a package (safetensors) that does not load
        findings.append(Finding("error", _one_line(error), _REINSTALL))
        return False
    return True


def _lines(report: Explanation) -> list[str]:
    build, torch_info, cpu = report["build"], report["torch"], report["cpu"]
    lines = [f"rfkernels {report['rfkernels']}, Python {report['python']} at {sys.executable}"]
    if build:
        archs = ", ".join(f"sm_{arch}" for arch in build["cuda_archs"])
        cuda = f"CUDA {build['cuda']} for {archs}" if build["cuda"] else "no CUDA"
        lines.append(f"build    {build['version']}, {build['compiler']}, {cuda}")
    if torch_info:
        table = "DLPack C table" if torch_info["dlpack_c_table"] else "__dlpack__ calls (no C table)"
        cuda = f"CUDA {torch_info['cuda']}" if torch_info["cuda"] else "CPU only"
        lines.append(f"torch    {torch_info['version']}, {cuda}; tensors reach the kernels through {table}")
    kernels = f"kernels for {cpu['isa']}, " if cpu["isa"] else ""
    bf16 = "fast" if cpu["fast_bf16"] else "no fast"
    threads = f"{cpu['threads']} threads, " if cpu["threads"] else ""
    lines.append(f"cpu      {cpu['machine']}, {cpu['cores']} cores, {threads}{kernels}{bf16} bf16")
    if cpu["features"]:
        lines.append(f"         {' '.join(cpu['features'])}")
    for device in report["devices"]:
        code = (
            f"runs the sm_{device['built_arch']} code"
            if device["built_arch"]
            else "not covered by this build"
        )
        lines.append(f"device   {device['device']} {device['name']} (sm_{device['sm']}): {code}")
    if not report["devices"]:
        lines.append("device   cpu (torch sees no GPU)")
    for weights in report["weights"]:
        state = "intact" if weights["intact"] else "damaged"
        lines.append(f"weights  {weights['name']} {weights['megabytes']} MB, {state}, {weights['path']}")
    attention = report["attention"]
    if attention:
        auto = (
            f"of the last {attention['auto_calls']} with auto, {attention['auto_heads_in_full']} of "
            f"{attention['auto_heads']} heads fell back to full precision"
            if attention["auto_calls"]
            else "none with auto yet"
        )
        lines.append(f"attend   calls given to torch: {attention['delegated']}; {auto}")
    return [*lines, *_op_table(report["ops"]), *_problem_lines(report["problems"])]


def _op_table(ops: list[dict[str, str]]) -> list[str]:
    if not ops:
        return []
    rows = [("op", "cpu", "cuda"), *((row["op"], row["cpu"], row["cuda"]) for row in ops)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "",
        *(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ),
    ]


def _problem_lines(problems: list[dict[str, str]]) -> list[str]:
    if not problems:
        return ["", "no problems found"]
    return ["", *(f"{p['level']}: {p['problem']} -> {p['fix']}" for p in problems)]


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
