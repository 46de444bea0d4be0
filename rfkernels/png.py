"""Pictures on disk: written whole or not at all, with the parameters that made them.

A PNG carries two text chunks: "parameters", the line format that most image tools show, and
"rfkernels", the same as JSON, from which a picture can be made again to the bit.
"""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

__all__ = ["PngError", "check_target", "parameters_text", "read_parameters", "read_text", "write_image"]

JSON_KEY = "rfkernels"
TEXT_KEY = "parameters"

_FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}


class PngError(ValueError):
    """A picture cannot be read or written as asked; the message is one line that says what to do."""


def write_image(path: str | Path, image: Image.Image, parameters: Mapping[str, Any]) -> None:
    """Writes `image` to `path` in the format of its extension: PNG, WebP (lossless) or JPEG (on white).

    `parameters` go into a PNG as text chunks (see `parameters_text`) and JSON; the other formats carry
    none. The file appears complete or not at all: it is written beside its target and renamed.
    Raises `PngError` if the target cannot be written.
    """
    path = Path(path)
    check_target(path)
    kind = _FORMATS[path.suffix.lower()]
    options: dict[str, Any] = {}
    if kind == "PNG":
        info = PngInfo()
        info.add_text(TEXT_KEY, parameters_text(parameters))
        info.add_text(JSON_KEY, json.dumps(dict(parameters), ensure_ascii=True))
        options = {"pnginfo": info, "optimize": True}
    elif kind == "WEBP":
        options = {"lossless": True}
    else:
        image = on_colour(image, (255, 255, 255))
        options = {"quality": 95}

    draft = _draft_of(path)
    try:
        with open(draft, "xb") as file:
            image.save(file, kind, **options)
        os.replace(draft, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or never made
            draft.unlink()


def check_target(path: str | Path) -> None:
    """Raises `PngError` unless a picture can be written to `path`; leaves nothing behind."""
    path = Path(path)
    try:
        if path.is_dir():
            raise PngError(f"{path} is a folder: name a file in it, for example {path / 'out.png'}")
        if path.suffix.lower() not in _FORMATS:
            raise PngError(f"{path} has no known image extension: use one of {', '.join(_FORMATS)}")
        if not path.parent.is_dir():
            raise PngError(f"the folder {path.parent} does not exist: create it, or choose another -o")
        if path.exists() and not os.access(path, os.W_OK):
            raise PngError(f"{path} is write-protected: choose another -o")
        draft = _draft_of(path)
        with open(draft, "xb"):
            pass
        draft.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def parameters_text(parameters: Mapping[str, Any]) -> str:
    """The parameters in the widespread form: the prompt, then one line of `Name: value` pairs."""
    prompts: Sequence[str] = parameters.get("prompts", [])
    adapters: Mapping[str, float] = parameters.get("lora") or {}
    fields = {
        "Steps": parameters.get("steps"),
        "Sampler": parameters.get("method"),
        "Schedule type": parameters.get("schedule"),
        "Shift": parameters.get("shift"),
        "CFG scale": parameters.get("guidance"),
        "Seed": parameters.get("seed"),
        "Size": "{0}x{0}".format(parameters["size"]) if "size" in parameters else None,
        "Model hash": str(parameters.get("weights") or "").removeprefix("sha256:")[:10] or None,
        "Model": parameters.get("model"),
        "Style": parameters.get("style"),
        "LoRA": " ".join(f"{name}:{strength}" for name, strength in adapters.items()) or None,
        "Version": f"rfkernels {parameters['version']}" if "version" in parameters else None,
    }
    line = ", ".join(f"{name}: {_plain(value)}" for name, value in fields.items() if value is not None)
    return " | ".join(prompts).replace("\0", " ") + "\n" + line


def read_text(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG file, by keyword. Raises `PngError` if `path` is not a readable PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # a truncated file fails here, and chunks after the pixels are read
            return {str(key): str(value) for key, value in image.text.items()}
    except FileNotFoundError as error:
        raise PngError(f"{path} does not exist: check the name") from error
    except UnidentifiedImageError as error:
        raise PngError(f"{path} is not a PNG picture: only PNG files carry parameters") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PngError(f"cannot read {path} as PNG: {_one_line(reason)}; use an intact file") from error


def read_parameters(path: str | Path) -> dict[str, Any]:
    """The parameters that `write_image` stored in the PNG `path`; `PngError` if there are none."""
    text = read_text(path).get(JSON_KEY)
    if text is None:
        raise PngError(f"{path} carries no rfkernels parameters: use a PNG made by `rfkernels generate`")
    try:
        parameters = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PngError(
            f"the parameters in {path} are damaged ({_one_line(error)}): use another file"
        ) from error
    if not isinstance(parameters, dict):
        raise PngError(f"the parameters in {path} are damaged (not a JSON object): use another file")
    return parameters


def on_colour(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """`image` laid on a plain background, as RGB."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*colour, 255)), image).convert("RGB")


def _draft_of(path: Path) -> Path:
    return path.with_name(f".rfkernels-{os.getpid()}-{token_hex(4)}.tmp")


def _unwritable(path: Path, error: OSError) -> PngError:
    return PngError(f"cannot write {path}: {error.strerror or error}; choose another -o")


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
