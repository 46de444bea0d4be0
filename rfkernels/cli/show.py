"""`rfkernels show`: the parameters that a picture carries, or what the package has to draw with."""

from pathlib import Path
from typing import Annotated

import typer

from rfkernels import png
from rfkernels.cli.console import UserError, note, print_json
from rfkernels.cli.preview import colour_depth, preview

__all__ = ["show"]

_KINDS = {"models": "model", "loras": "LoRA", "few": "few"}


def show(
    file: Annotated[Path | None, typer.Argument(help="A PNG picture.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the parameters as JSON.")] = False,
    picture: Annotated[
        bool, typer.Option("--preview/--no-preview", help="Show the picture where the terminal has colours.")
    ] = True,
) -> None:
    """Print the parameters that FILE was made with, and show the picture; without FILE: models and LoRAs."""
    if file is None:
        _show_package(json)
        return
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


def _show_package(json: bool) -> None:
    """The weights and adapters in the package, with their sizes."""
    from rfkernels import loras
    from rfkernels.models.emoji import DEFAULT_WEIGHTS

    found = {
        "models": {"emoji": DEFAULT_WEIGHTS},
        "loras": loras.shipped(),
        "few": {"few": loras.FEW} if loras.FEW.is_file() else {},
    }
    if json:
        print_json(found)
        return
    for kind, files in found.items():
        for name, path in files.items():
            size = f"{path.stat().st_size / 1e6:.2f} MB" if path.is_file() else "missing"
            print(f"{_KINDS[kind]:8}{name:12}{size:>10}")


def _printable(text: str) -> str:
    """`text` without control characters: a file from elsewhere must not drive the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)
