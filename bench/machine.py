"""What the figures were taken on: machine, versions, commit."""

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def cache_bytes(device: str) -> int:
    """The last-level cache: the GPU's L2, or the largest cache the first CPU reports (32 MiB if none)."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [int(p.read_text().strip().removesuffix("K")) * 1024 for p in sizes if p.read_text().strip()]
    return max(found, default=32 << 20)


def machine(device: str) -> dict[str, Any]:
    """CPU, cores, memory, caches, and the GPU if it is what is measured."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    thp = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    info = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": pages,
        "cache_bytes": cache_bytes("cpu"),
        "huge_pages": thp.read_text().strip() if thp.exists() else "unknown",
        "system": f"{platform.system()} {platform.release()}",
        "load_average": round(os.getloadavg()[0], 2),
        "gpu": None,
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        info["gpu"] = {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
            "l2_bytes": gpu.L2_cache_size,
            "clocks": _gpu_clocks(),
        }
    return info


def versions() -> dict[str, Any]:
    """Python, torch, CUDA as torch was built, and how our kernels were built."""
    try:
        from rfkernels import _C

        ours = _C.build_info()
    except ImportError:
        ours = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rfkernels": ours,
    }


def commit(given: str | None = None) -> dict[str, Any]:
    """The commit of the working tree and whether it has changes; `given` names it where there is no git."""
    if given:
        return {"id": given, "dirty": None}
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if head is None:
        return {"id": None, "dirty": None}
    changes = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return {"id": head, "dirty": bool(changes)}


def now() -> str:
    """The time of the run, ISO 8601 in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def command() -> str:
    """The command line of the run, from `python` on."""
    return " ".join(["python -m bench", *sys.argv[1:]])


def _cpu_model() -> str:
    """The model, with the family numbers where a virtual machine hides the name."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = (line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines}
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def _gpu_clocks() -> str | None:
    query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    return _output("nvidia-smi", query, "--format=csv,noheader", "--id=0")


def _output(*command: str) -> str | None:
    """What the command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
