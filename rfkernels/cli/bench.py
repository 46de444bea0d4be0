"""`rfkernels bench`: the benchmarks of the source tree."""

import subprocess
import sys
from pathlib import Path

import typer

import rfkernels
from rfkernels.cli.console import UserError

__all__ = ["CONTEXT", "bench", "find_benchmarks"]

# Everything after the verb goes to `python -m bench` as it stands, --help included.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def bench(context: typer.Context) -> None:
    """Measure the kernels (in a source tree): all arguments go to `python -m bench`."""
    tree = find_benchmarks([Path(rfkernels.__file__).parent.parent, Path.cwd()])
    if tree is None:
        raise UserError(
            "the benchmarks are part of the source tree, not of the installed package: "
            "change into a clone of rfkernels and run this again"
        )
    raise typer.Exit(subprocess.run([sys.executable, "-m", "bench", *context.args], cwd=tree).returncode)


def find_benchmarks(folders: list[Path]) -> Path | None:
    """The first of `folders` that holds the benchmarks of this project."""
    return next(
        (f for f in folders if (f / "bench" / "__main__.py").exists() and (f / "csrc").is_dir()), None
    )
