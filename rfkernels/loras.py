"""The LoRAs of a pipeline: those in the package by name, any other by file, switched from call to call."""

import copy
import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from rfkernels.settings import InputError, require

__all__ = ["FEW", "Rack", "find", "shared_copy", "shipped"]

FOLDER = Path(__file__).parent / "weights"
FEW = FOLDER / "emoji-few.safetensors"  # the adapter for at most FEW_STEPS steps
FEW_STEPS = 2


def shipped() -> dict[str, Path]:
    """The LoRAs in the package by name."""
    return {path.stem.removeprefix("lora-"): path for path in sorted(FOLDER.glob("lora-*.safetensors"))}


def find(name: str) -> Path:
    """The file of a LoRA: one of the package by its name, else a file. Raises `InputError`."""
    known = shipped()
    if name in known:
        return known[name]
    path = Path(name)
    require(
        path.is_file() or (path / "adapter_config.json").is_file(),
        f"unknown LoRA {name!r}: use one of {', '.join(known) or '(none in this package)'}, or a file",
    )
    return path


def shared_copy(model: nn.Module) -> nn.Module:
    """A model of its own modules with the very parameters and buffers of `model`."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class Rack:
    """Adapters beside a model that itself is never touched.

    They are loaded once, into a copy of the model's modules that shares its parameters, and switched by
    writing their strengths. Calls with adapters take turns, since there is one set of strengths; calls
    without run on the model itself and need no turn.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._model: nn.Module | None = None
        self._digests: dict[Path, str] = {}

    def load(self, model: nn.Module, files: Sequence[Path]) -> None:
        """Loads those of `files` that are not yet. Raises `InputError` for one that does not fit."""
        with self._lock:
            for file in files:
                self._load(model, file)

    @contextmanager
    def on(self, model: nn.Module, strengths: dict[Path, float]) -> Iterator[nn.Module]:
        """The model with the adapters of these files on and all others off; `model` itself for none."""
        if not strengths:
            yield model
            return
        from rfkernels.adapters.load import set_adapters

        with self._lock:
            for file in strengths:
                self._load(model, file)
            set_adapters(self._model, [str(file) for file in strengths], list(strengths.values()))
            yield self._model

    def digest(self, file: Path) -> str:
        """sha256 of the file that was loaded."""
        return self._digests[file]

    def _load(self, model: nn.Module, file: Path) -> None:
        if file in self._digests:
            return
        from safetensors import SafetensorError

        from rfkernels.adapters.load import load_lora

        if self._model is None:
            self._model = shared_copy(model)
        try:
            load_lora(self._model, file, name=str(file))
            tensors = file if file.is_file() else file / "adapter_model.safetensors"
            self._digests[file] = hashlib.sha256(tensors.read_bytes()).hexdigest()
        except (ValueError, OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"the LoRA {file} cannot be used: {reason:.300}") from error
