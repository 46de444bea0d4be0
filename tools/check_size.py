"""Fails where a file, function or kernel has grown past what one can read at once.

Limits: file 400 lines, function 60, CUDA kernel 120. Exceptions stand below, each with its reason.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 400, 60, 120
EXCEPTIONS: dict[str, str] = {}  # "path" or "path:function" -> reason

PYTHON, CPP = {".py"}, {".h", ".cpp", ".cu", ".cuh"}


def sources() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], check=True, capture_output=True, text=True).stdout.split()
    return [p for p in map(Path, listed) if p.suffix in PYTHON | CPP and p.exists()]


def python_functions(text: str) -> list[tuple[str, int]]:
    """Name and lines of every function, its docstring not counted."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node) is not None:
                lines -= first.end_lineno - first.lineno + 1
            found.append((node.name, lines))
    return found


def cpp_functions(text: str) -> list[tuple[str, int]]:
    """Name and lines of every block that opens on a line ending in `) {` or `) const {`, by brace depth."""
    found, open_blocks, depth = [], [], 0
    for number, line in enumerate(text.splitlines(), 1):
        code = re.sub(r"//.*|__launch_bounds__\([^)]*\)|\"(\\.|[^\"])*\"|'(\\.|[^'])'", "", line)
        name = re.search(r"(\w+)\s*\([^;]*\)\s*(const)?\s*\{\s*$", code)
        if name and name.group(1) not in {"if", "for", "while", "switch"}:
            open_blocks.append((name.group(1), number, depth))
        depth += code.count("{") - code.count("}")
        while open_blocks and depth <= open_blocks[-1][2]:
            opened, start, _ = open_blocks.pop()
            found.append((opened, number - start + 1))
    return found


def problems(path: Path) -> list[str]:
    text = path.read_text()
    lines = len(text.splitlines())
    found = [(f"{path}", lines, FILE_LINES)] if lines > FILE_LINES else []
    functions = python_functions(text) if path.suffix in PYTHON else cpp_functions(text)
    for name, length in functions:
        limit = KERNEL_LINES if name.endswith("_kernel") else FUNCTION_LINES
        if length > limit:
            found.append((f"{path}:{name}", length, limit))
    return [f"{where}: {n} lines, at most {limit}" for where, n, limit in found if where not in EXCEPTIONS]


def main() -> int:
    found = [p for path in sources() for p in problems(path)]
    print("\n".join(found) or "sizes: fine")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
