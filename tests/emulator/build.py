"""Compiles the .cu files of csrc and of the emulator's own tests as C++ into `rfkernels_emulated`.

The .cu files are compiled with every load and store reported to memory.cpp (the calls of GCC's thread
sanitizer, whose library is not linked) and under the undefined-behaviour sanitizer; the emulator itself is
plain C++.
"""

import hashlib
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fvisibility=hidden"]
FLAGS += ["-fno-gnu-unique", "-Wall", "-Wno-unknown-pragmas"]
UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-fno-sanitize=vptr"]
CHECKED = [*UNDEFINED, "-fsanitize=thread", "-fno-tree-sra"]  # SRA would split a 16-byte access into elements
CHECKED += ["-x", "c++", "-include", str(HERE / "cuda.h")]


def kernels() -> list[Path]:
    """The CUDA files; those for one architecture alone (`*_sm90.cu`) cannot run here."""
    found = [*ROOT.glob("csrc/*/*.cu"), *HERE.glob("kernels/*.cu")]
    return sorted(path for path in found if not path.stem.endswith("_sm90"))


def sources() -> dict[Path, list[str]]:
    """Every file of the module and the flags that are its own."""
    host = [ROOT / "csrc/core/tensor.cpp", ROOT / "csrc/core/rows.cpp", ROOT / "python/dlpack.cpp"]
    checks = ["attention/attention.cpp", "norm/norm.cpp", "norm/gradients.cpp", "solver/combine.cpp"]
    checks.append("moe/grouped_linear.cpp")
    whole = [ROOT / "csrc" / path for path in checks]  # ops that are called with their checks
    plain = {path: [] for path in [*host, *sorted(HERE.glob("*.cpp"))]}
    return {path: CHECKED for path in kernels()} | {path: ["-DRFK_WITH_CUDA"] for path in whole} | plain


def _digest(paths: list[Path], words: list[str]) -> str:
    digest = hashlib.sha256(" ".join(words).encode())
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(folder: Path) -> Path:
    """Returns the compiled module; compiles only the sources that have changed, all if a header has."""
    folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "g++")
    include = [HERE, ROOT / "csrc", ROOT / "python", pybind11.get_include(), sysconfig.get_path("include")]
    options = [compiler, *FLAGS, *(f"-I{path}" for path in include)]
    folders = (ROOT / "csrc", ROOT / "python", HERE)
    headers = _digest([p for f in folders for p in f.rglob("*") if p.suffix in (".h", ".cuh")], options)

    def compile_one(source: Path) -> Path:
        own = sources()[source]
        target = folder / f"{source.name}-{_digest([source], [headers, *own])}.o"
        if not target.exists():
            subprocess.run([*options, *own, "-c", source, "-o", f"{target}.partial"], check=True)
            os.replace(f"{target}.partial", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources()))
    name = f"rfkernels_emulated-{_digest(objects, [])}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not (folder / name).exists():
        command = [compiler, *FLAGS, *UNDEFINED, "-shared", *objects, "-o", f"{folder / name}.partial"]
        subprocess.run(command, check=True)
        os.replace(f"{folder / name}.partial", folder / name)
    return folder / name


@cache
def _attempt() -> Path | subprocess.CalledProcessError:
    """The compiled module, or why there is none: one attempt for the whole process."""
    try:
        return build(ROOT / "build/emulator")
    except subprocess.CalledProcessError as error:
        return error


@cache
def load() -> ModuleType:
    path = _attempt()
    if not isinstance(path, Path):
        raise path
    spec = importlib.util.spec_from_file_location("rfkernels_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
