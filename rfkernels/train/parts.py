"""A large file as a few small ones, and back: a checkpoint where the size of a file is limited."""

import hashlib
import json
from pathlib import Path

__all__ = ["LARGEST", "join", "split"]

LARGEST = 15 * 2**20  # bytes of a part


def split(file: Path, folder: Path, *, largest: int = LARGEST, most: int = 4) -> list[Path]:
    """Writes `file` as NAME.0, NAME.1, ... and NAME.json (bytes and sha256) into `folder`; returns them all.

    Raises:
        ValueError: more than `most` parts would be needed.
    """
    data = Path(file).read_bytes()
    count = max(1, -(-len(data) // largest))
    if count > most:
        raise ValueError(f"{file} has {len(data)} bytes: at most {most} parts of {largest} bytes are allowed")
    folder = Path(folder)
    for old in folder.glob(f"{file.name}.*"):
        old.unlink()
    made = [folder / f"{file.name}.{i}" for i in range(count)]
    for i, path in enumerate(made):
        path.write_bytes(data[i * largest : (i + 1) * largest])
    record = {"parts": [path.name for path in made], "bytes": len(data), "sha256": _digest(data)}
    manifest = folder / f"{file.name}.json"
    manifest.write_text(json.dumps(record))
    return [*made, manifest]


def join(folder: Path, name: str, target: Path) -> Path:
    """Puts the parts of `name` in `folder` together as `target`, whole or not at all.

    Raises:
        ValueError: a part or the manifest is missing, or the bytes are not those that were split.
    """
    folder, target = Path(folder), Path(target)
    try:
        record = json.loads((folder / f"{name}.json").read_text())
        data = b"".join((folder / Path(part).name).read_bytes() for part in record["parts"])
        wanted = record["bytes"], record["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: the parts of {name} are not complete ({error})") from None
    if (len(data), _digest(data)) != wanted:
        raise ValueError(
            f"{folder}: the parts of {name} are damaged: {wanted[0]} bytes of sha256 {wanted[1]} are "
            f"required, got {len(data)} of {_digest(data)}"
        )
    partial = target.with_suffix(".joining")
    partial.write_bytes(data)
    return partial.replace(target)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
