"""Compiles every CUDA kernel for every architecture; fails where one spills or keeps a stack in local memory.

    python tools/compile_matrix.py [--arch 90 --arch 120]

Prints what ptxas reports, a line per kernel and architecture, over all instances of the kernel's template.
Reports are kept in build/matrix/ until a source, a flag or nvcc changes. Without nvcc there is nothing to do.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("csrc/*/*.cu", "tests/emulator/kernels/*.cu")
HEADERS = ("csrc/*/*.h", "csrc/*/*.cuh", "tests/emulator/kernels/*.h")
ARCHS = ("80", "86", "87", "89", "90", "120")  # as in CMakeLists.txt, and so are the flags
SM90_ARCHS = ("90a",)  # of *_sm90.cu
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "--fmad=false", "--expt-relaxed-constexpr", "-Icsrc", "-Xptxas=-v")
EXCEPTIONS: dict[str, str] = {}  # kernel, without its template arguments -> why its spill or stack is wanted


class CompileError(Exception):
    """What nvcc said."""


@dataclass
class Usage:
    """What one instance of a kernel takes; memory in bytes."""

    source: str
    arch: str
    name: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0

    @property
    def kernel(self) -> str:
        return self.name.split("<")[0]

    @property
    def in_registers(self) -> bool:
        return not (self.stack or self.spill_stores or self.spill_loads)


def parse(source: str, report: str) -> list[Usage]:
    """The kernels, and functions they call, in what `ptxas -v` printed, its names demangled."""
    found: list[Usage] = []
    arch = ""
    for line in report.splitlines():
        if entry := re.search(r"Compiling entry function '.*' for 'sm_(\w+)'", line):
            arch = entry[1]
        elif function := re.search(r"Function properties for (.*)", line):
            found.append(Usage(source, arch, short(function[1])))
        elif memory := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line):
            found[-1].stack, found[-1].spill_stores, found[-1].spill_loads = map(int, memory.groups())
        elif registers := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[-1].registers = int(registers[1])
            found[-1].shared = int(shared[1]) if shared else 0
    return found


def short(name: str) -> str:
    """void rfk::scale_kernel<float, rfk::f16>(float*, int) -> scale_kernel<float, f16>"""
    name = re.sub(r"\(anonymous namespace\)::|\w+::|^void ", "", name)
    depth = 0
    for at, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:at]
    return name


def compile_one(nvcc: str, source: Path, arch: str) -> list[Usage]:
    own_headers = f"-I{source.parents[1]}"  # after csrc: the emulator's core/ stands in for ours, on the CPU
    command = [nvcc, *FLAGS, own_headers, f"-arch=sm_{arch}", "-cubin", source, "-o", os.devnull]
    run = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if run.returncode:
        raise CompileError(f"{source}, sm_{arch}:\n{run.stdout}")
    report = subprocess.run(["c++filt"], input=run.stdout, text=True, capture_output=True, check=True).stdout
    return parse(source.stem, report)


def fingerprint(nvcc: str) -> str:
    """Of all that decides a report, but for the source and its architecture."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + Path(__file__).read_bytes())  # this file: the flags and the parser
    for path in sorted(p for pattern in HEADERS for p in ROOT.glob(pattern)):
        digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()


def cached(nvcc: str, source: Path, arch: str, common: str, folder: Path) -> list[Usage]:
    key = hashlib.sha256(common.encode() + source.read_bytes()).hexdigest()
    file = folder / f"{source.parent.name}-{source.stem}-sm_{arch}.json"
    if file.exists():
        kept = json.loads(file.read_text())
        if kept["key"] == key:
            return [Usage(**usage) for usage in kept["kernels"]]
    kernels = compile_one(nvcc, source, arch)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"key": key, "kernels": [asdict(usage) for usage in kernels]}))
    return kernels


def measure(nvcc: str, sources: Sequence[Path], archs: Sequence[str], folder: Path) -> list[Usage]:
    """The usage of every kernel in `sources`, for those of `archs` that each source is meant for."""
    common = fingerprint(nvcc)
    meant = lambda source: SM90_ARCHS if source.stem.endswith("_sm90") else ARCHS
    jobs = [(source, arch) for source in sources for arch in meant(source) if arch in archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda job: cached(nvcc, *job, common, folder), jobs))
    return [usage for kernels in found for usage in kernels]


def table(usages: Sequence[Usage]) -> Iterator[str]:
    """A line per source, kernel and architecture: its instances, their registers, the most of the rest."""
    layout = "{:20} {:27} {:>6} {:>9} {:>9} {:>7} {:>6} {:>7} {:>6}"
    yield layout.format(
        "source", "kernel", "arch", "instances", "registers", "shared", "stack", "stores", "loads"
    )
    where = lambda usage: (usage.source, usage.kernel, int(usage.arch.rstrip("a")))
    for (source, kernel, _), group in groupby(sorted(usages, key=where), where):
        same = list(group)
        registers = sorted(usage.registers for usage in same)
        span = f"{registers[0]}-{registers[-1]}" if registers[0] < registers[-1] else f"{registers[0]}"
        names = ("shared", "stack", "spill_stores", "spill_loads")
        most = [max(getattr(usage, name) for usage in same) for name in names]
        yield layout.format(source, kernel, same[0].arch, len(same), span, *most)


def offenders(usages: Sequence[Usage], exceptions: dict[str, str]) -> list[str]:
    return [
        f"{u.source}, sm_{u.arch}: {u.name} has {u.stack} bytes of stack, {u.spill_stores} of spill stores, "
        f"{u.spill_loads} of spill loads; put it in registers, or its reason in EXCEPTIONS"
        for u in usages
        if not u.in_registers and u.kernel not in exceptions
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel; fail on spills and local memory.")
    choices = (*ARCHS, *SM90_ARCHS)
    parser.add_argument("--arch", action="append", choices=choices, help="only this one (may be repeated)")
    archs = parser.parse_args(arguments).arch or choices
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        print("matrix: no nvcc here, the kernels were not compiled")
        return 0
    sources = [path for pattern in SOURCES for path in sorted(ROOT.glob(pattern))]
    try:
        usages = measure(nvcc, sources, archs, ROOT / "build/matrix")
    except CompileError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(table(usages)))
    found = offenders(usages, EXCEPTIONS)
    print("\n".join(found) or f"matrix: {len(usages)} kernels, fine")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
