"""`rfkernels show`: the parameters that a picture carries."""

from pathlib import Path
from typing import Annotated

import typer

from rfkernels import png
from rfkernels.cli.console import UserError, note, print_json
from rfkernels.cli.preview import colour_depth, preview

__all__ = ["show"]


def show(
    file: Annotated[Path, typer.Argument(help="A PNG picture.")],
    json: Annotated[bool, typer.Option("--json", help="Print the parameters as JSON.")] = False,
    picture: Annotated[
        bool, typer.Option("--preview/--no-preview", help="Show the picture where the terminal has colours.")
    ] = True,
) -> None:
    """Print the parameters that FILE was made with, and show the picture."""
    text = png.read_text(file)
    if json:
        print_json(png.read_parameters(file))
        return
    if png.TEXT_KEY not in text:
        raise UserError(f"{file} carries no parameters: use a PNG made by `rfkernels generate`")
    depth = colour_depth() if picture else 0
    if depth:
        from PIL import Image

        with Image.open(file) as image:
            print(preview([image], depth))
    print(_printable(text[png.TEXT_KEY]))
    if png.JSON_KEY in text:
        note(f"make it again: rfkernels generate --from {file} -o again.png")
    else:
        note("written by another tool: --from cannot use it")


def _printable(text: str) -> str:
    """`text` without control characters: a file from elsewhere must not drive the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)
