"""The command `rfkernels`: one file per verb, one way to fail."""

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: that of the process) and returns its exit code.

    0: done. 1: the work itself failed. 2: the user can mend it, one line on stderr says how. 130: stopped.
    """
    try:
        from rfkernels.cli.app import run
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich"):
            raise
        print(
            "rfkernels: the command line needs more packages: pip install 'rfkernels[cli]'", file=sys.stderr
        )
        return 2
    return run(argv)
