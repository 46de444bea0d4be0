"""`rfkernels doctor`: what is built, seen and used, and one fix per line for what is wrong."""

from typing import Annotated

import typer

from rfkernels.cli.console import print_json

__all__ = ["doctor"]


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say what is built, which op runs where and why, and how to fix what is wrong (exit code 1 then)."""
    from rfkernels.diagnosis import explain

    report = explain()
    if json:
        print_json(report)
    else:
        print(report)
    if any(problem["level"] == "error" for problem in report["problems"]):
        raise typer.Exit(1)
