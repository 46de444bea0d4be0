"""Output of the verbs: results on stdout, everything else on stderr."""

import json
import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["UserError", "note", "print_json", "progress_bar"]


class UserError(ValueError):
    """Something the user can mend; the message is one line that says how."""


def note(message: str, *, quiet: bool = False) -> None:
    """A line for people, on stderr."""
    if not quiet:
        print(message, file=sys.stderr)


def print_json(value: Any) -> None:
    """`value` as the only thing on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def progress_bar(*, quiet: bool) -> Progress:
    """A bar on stderr that vanishes when done; silent where stderr is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
