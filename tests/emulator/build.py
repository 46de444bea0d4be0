"""Compiles csrc/*/*.cu as C++ into `rfkernels_emulated`, under the undefined-behaviour sanitizer."""

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).parents[2]
FLAGS = [
    *[
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-fopenmp",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-Wno-unknown-pragmas",
    ],
    *["-fsanitize=undefined", "-fno-sanitize-recover=all", "-fno-sanitize=vptr"],
]


def sources() -> list[Path]:
    kernels = sorted(ROOT.glob("csrc/*/*.cu"))
    host = [ROOT / "csrc/core/tensor.cpp", ROOT / "csrc/core/rows.cpp", ROOT / "python/dlpack.cpp"]
    return [*kernels, *host, ROOT / "tests/emulator/module.cpp"]


def _fingerprint() -> str:
    files = [p for pattern in ("csrc/*/*", "python/*", "tests/emulator/**/*") for p in ROOT.glob(pattern)]
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(p for p in files if p.is_file() and p.suffix != ".pyc"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(folder: Path) -> Path:
    """Returns the compiled module; compiles only where a source has changed."""
    folder = folder / _fingerprint()
    module = folder / f"rfkernels_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "c++")
    include = [ROOT / "tests/emulator", ROOT / "csrc", ROOT / "python", pybind11.get_include()]
    include.append(sysconfig.get_path("include"))
    options = [*FLAGS, *(f"-I{path}" for path in include)]
    objects = [folder / f"{s.parent.name}-{s.name}.o" for s in sources()]

    def compile_one(source: Path, target: Path) -> None:
        subprocess.run([compiler, *options, "-x", "c++", "-c", source, "-o", target], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources(), objects))
    subprocess.run([compiler, *FLAGS, "-shared", *objects, "-o", f"{module}.partial"], check=True)
    os.replace(f"{module}.partial", module)
    return module


def load() -> ModuleType:
    path = build(ROOT / "build/emulator")
    spec = importlib.util.spec_from_file_location("rfkernels_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
