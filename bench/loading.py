"""Loading a checkpoint into a model, over reading its file once: `python -m bench.loading [GB] [folder]`.

The file has bfloat16 layers like those of a FLUX block, and lies in the page cache; the best of the rounds
counts. `load` maps the file and copies nothing, so that numbers are read where they are first used: every
page of the model is touched within the time.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from rfkernels.formats import load
from rfkernels.formats.writer import write_safetensors

ROUNDS, WIDTH = 5, 3072
LAYER = 2 * WIDTH * 4 * WIDTH  # bytes


def main(gigabytes: float = 1.0, folder: str | None = None) -> None:
    layers = max(1, round(gigabytes * 1e9 / LAYER))
    with tempfile.TemporaryDirectory(dir=folder) as made:
        path = Path(made) / "model.safetensors"
        weight = torch.randn(4 * WIDTH, WIDTH).bfloat16()
        write_safetensors(path, [(f"{i}.weight", weight) for i in range(layers)])
        sides = {"read": lambda: _read(path), "load": lambda: _load(path, layers)}
        best = {name: min(_seconds(side) for _ in range(ROUNDS)) for name, side in sides.items()}
    size = layers * LAYER
    for name, seconds in best.items():
        print(f"{name}  {seconds:6.3f} s  {size / seconds / 1e9:5.2f} GB/s")
    print(f"load / read  {best['load'] / best['read']:.2f}x of {size / 1e9:.2f} GB")


def _read(path: Path) -> None:
    buffer = bytearray(1 << 24)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _load(path: Path, layers: int) -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(WIDTH, 4 * WIDTH, bias=False) for _ in range(layers)))
    model = load(model.bfloat16(), path)
    for parameter in model.parameters():
        parameter.detach().view(torch.int16).flatten()[:: 4096 // 2].sum()


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(*(float(word) for word in sys.argv[1:2]), *sys.argv[2:3])
