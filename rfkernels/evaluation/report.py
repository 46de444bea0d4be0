"""Scores as a table for people, and samples on a sheet, each marked right or wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import ImageOps
from torch import Tensor

from rfkernels.models.emoji import to_images

__all__ = ["table", "write_sheet"]

RIGHT, WRONG = (60, 170, 80), (215, 60, 50)
FRAME, COLUMNS = 4, 8


def table(scores: dict[str, Any]) -> str:
    """Plain numbers first, then one table for each group of rows."""
    plain = {k: v for k, v in scores.items() if not isinstance(v, dict)}
    plain |= {f"{k} {name}": v for k, row in scores.items() if _is_row(row) for name, v in row.items()}
    width = max(map(len, plain))
    parts = ["\n".join(f"{k.replace('_', ' '):{width}}  {_number(v)}" for k, v in plain.items())]
    parts += [_grid(k, v) for k, v in scores.items() if isinstance(v, dict) and v and not _is_row(v)]
    return "\n\n".join(parts)


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and not any(isinstance(v, dict) for v in value.values())


def _number(value: Any) -> str:
    return (
        f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )


def _grid(name: str, rows: dict[Any, dict[str, Any]]) -> str:
    columns = [name.replace("_", " "), *(c.replace("_", " ") for c in next(iter(rows.values())))]
    lines = [columns, *([str(k), *map(_number, row.values())] for k, row in rows.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(w.rjust(n) for w, n in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def write_sheet(path: Path, captions: Sequence[str], pictures: Tensor, right: Sequence[bool]) -> None:
    """All pictures with their captions in a green frame (right) or a red one (wrong), in rows of eight."""
    from rfkernels.cli.sheet import sheet

    frames = [
        ImageOps.expand(image, FRAME, (*(RIGHT if hit else WRONG), 255))
        for image, hit in zip(to_images(pictures), right, strict=True)
    ]
    page = sheet(frames, list(captions), COLUMNS)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
