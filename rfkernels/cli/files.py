"""What the verbs on weight files share: their options, and errors of files as errors of the user."""

from collections.abc import Iterator
from contextlib import contextmanager

from rfkernels.cli.console import UserError

__all__ = ["DTYPES", "dtype_of", "file_errors", "printable", "size_of"]

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@contextmanager
def file_errors() -> Iterator[None]:
    """Errors of a file, or of what was asked of it, are the user's to mend."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(printable(error)) from None


def printable(text: object) -> str:
    """`text` without control characters: a file from elsewhere must not drive the terminal."""
    return "".join(char if char.isprintable() else " " for char in str(text))


def dtype_of(name: str | None):
    """The torch dtype of a name of the command line."""
    import torch

    if name is None:
        return None
    known = {**DTYPES, **{full: full for full in DTYPES.values()}}
    if name not in known:
        raise UserError(f"--dtype must be one of {', '.join(known)}, got {name}")
    return getattr(torch, known[name])


def size_of(text: str | None) -> int | None:
    """Bytes of "5GB", "500MiB" or a plain number."""
    if text is None:
        return None
    number = text.upper().removesuffix("B").strip()
    unit = number.lstrip("0123456789.")
    try:
        return int(float(number.removesuffix(unit)) * _UNITS[unit.strip()])
    except (KeyError, ValueError, OverflowError):
        raise UserError(f"--shard-size must be bytes like 5GB or 500MiB, got {text}") from None
