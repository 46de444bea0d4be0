"""Checkpoints in several safetensors files with an index, as diffusers and transformers write them.

The index, `*.safetensors.index.json`, says in `weight_map` which file has each tensor. What index and files
say must agree; nothing is read of a tensor before it is asked for.
"""

import json
import re
from pathlib import Path

from rfkernels.formats.container import Checkpoint, Joined, open_checkpoint

__all__ = ["open_shards"]

_INDEX = ".safetensors.index.json"


def open_shards(path: Path) -> Checkpoint:
    """The checkpoint of an index, or of the one index or the one safetensors file in a directory.

    Raises:
        FileNotFoundError: no such directory, index or shard.
        ValueError: an index that is none, shards that it does not name, tensors in none or two of the shards.
    """
    if path.is_dir():
        found = sorted(path.glob(f"*{_INDEX}")) or sorted(path.glob("*.safetensors"))
        if not found:
            raise FileNotFoundError(f"{path}: a directory with a safetensors file is required, found none")
        if len(found) > 1:
            raise ValueError(
                f"{path}: one index, or one file, is required, got {[p.name for p in found][:6]}"
            )
        return open_checkpoint(found[0])
    places = _places(path)
    files = {name: path.with_name(name) for name in sorted(set(places.values()))}
    _check_files(path, files)
    shards = {name: open_checkpoint(file) for name, file in files.items()}
    for name, shard in shards.items():
        for tensor in shard:
            owner = places.get(tensor)
            if owner is None:
                raise ValueError(f"{path.with_name(name)}: {tensor} must be in the index {path.name}, is not")
            if owner != name:
                both = f"in {owner} and in {name}" if tensor in shards[owner] else f"in {name}"
                raise ValueError(f"{path}: {tensor} must be in {owner} alone, is {both}")
    for tensor, name in places.items():
        if tensor not in shards[name]:
            raise ValueError(f"{path.with_name(name)}: {tensor} must be there, says {path.name}, is not")
    metadata = {key: value for shard in shards.values() for key, value in shard.metadata.items()}
    return Checkpoint(Joined(shards, places), metadata)


def _places(path: Path) -> dict[str, str]:
    """Of each tensor, the name of its file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: an index of shards is required, found none")
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        if not places or not all(isinstance(file, str) for file in places.values()):
            raise TypeError(f"weight_map {str(places)[:80]}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        got = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: an index with the files of a weight_map is required, got {got}") from None
    outside = next((file for file in places.values() if Path(file).name != file or file in ("", "..")), None)
    if outside is not None:
        raise ValueError(f"{path}: names of files beside the index are required, got {outside!r}")
    return places


def _check_files(path: Path, files: dict[str, Path]) -> None:
    """All files of the index are there, and no others of their series."""
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{path}: shards {list(files)[:6]} are required, there is no {missing[:6]}")
    numbered = re.compile(re.escape(path.name.removesuffix(_INDEX)) + r"-\d+-of-\d+\.safetensors")
    extra = sorted(
        p.name for p in path.parent.iterdir() if numbered.fullmatch(p.name) and p.name not in files
    )
    if extra:
        raise ValueError(f"{path}: shards {list(files)[:6]} are required, there are also {extra[:6]}")
