"""The verbs put together, and what every verb shares: errors in one line, exit codes, --version."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import rfkernels
from rfkernels.cli import (
    bench,
    convert,
    doctor,
    evaluate,
    generate,
    inspect,
    mix,
    plan,
    quantize,
    show,
    train,
)

__all__ = ["app", "run"]

app = typer.Typer(
    name="rfkernels",
    help="Pictures from text by rectified flow, on compiled CPU and CUDA kernels.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("generate")(generate.generate)
app.command("mix")(mix.mix)
app.command("show")(show.show)
app.command("inspect")(inspect.inspect)
app.command("convert")(convert.convert)
app.command("quantize")(quantize.quantize)
app.command("doctor")(doctor.doctor)
app.command("bench", context_settings=bench.CONTEXT)(bench.bench)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("plan")(plan.plan)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rfkernels {rfkernels.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; see `rfkernels.cli.main`."""
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        code = app(args=words, prog_name="rfkernels", standalone_mode=False)
        return _fail("interrupted", 130) if code == 130 else code if isinstance(code, int) else 0
    except BrokenPipeError:  # the reader of our output is gone: no more output, no traceback at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ImportError as error:
        if error.name != "rfkernels._C" and "'_C'" not in str(error):
            raise
        return _fail("the compiled kernels do not load: rfkernels doctor says why and what to do", 2)
    except Exception as error:
        code = _exit_code_of(error)
        if code is None:
            raise
        format_message = getattr(error, "format_message", None)
        return _fail(format_message() if format_message else str(error), code)


def _exit_code_of(error: Exception) -> int | None:
    """2 for what the user can mend, 1 for work that failed, None for a defect of ours."""
    if hasattr(error, "format_message"):  # typer's own: a wrong flag, a missing argument
        return 2
    kinds = {(base.__module__, base.__name__) for base in type(error).__mro__}
    if not kinds.isdisjoint(_USER_ERRORS):
        return 2
    return 1 if ("rfkernels.pipeline", "ResultError") in kinds else None


# By name, so that a verb that needs no model imports none.
_USER_ERRORS = {
    ("rfkernels.cli.console", "UserError"),
    ("rfkernels.models.checkpoint", "WeightsError"),
    ("rfkernels.settings", "InputError"),
    ("rfkernels.png", "PngError"),
    ("rfkernels.train.packages", "DataError"),
}


def _fail(message: str, code: int) -> int:
    print("rfkernels:", " ".join(message.split()), file=sys.stderr)
    return code
