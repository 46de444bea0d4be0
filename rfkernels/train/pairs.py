"""Pairs (noise, caption, picture) for reflow and distillation: where a teacher's guided flow takes noise.

Pair i is a pure function of (weights, seed, i), also when a run stops and goes on: its noise is
`philox_normal` under the key (seed, i, 0) and is never stored, its caption is number i of a list of scenes,
its picture follows. A folder holds
`pictures.u8`, which grows, `captions.jsonl` beside it, and `record.json` that says what they are pairs of.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rfkernels import samplers
from rfkernels.models.emoji import DEFAULT_WEIGHTS, EmojiFlow, load_emoji
from rfkernels.objectives import reflow_pairs
from rfkernels.ops import noise_keys
from rfkernels.pipeline import resolve_dtype

__all__ = ["Captions", "Pairs", "digest_of", "make_pairs", "scene_captions"]

Captions = Callable[[int, int], list[str]]  # (first, count) -> the captions of those pairs
CHUNK = 64  # scenes that are made together: caption i is number i % CHUNK of batch i // CHUNK
BLANK = 50  # every 50th caption is empty, so that pictures without a prompt are kept


def digest_of(path: Path) -> str:
    """The sha256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def scene_captions(bank, seed: int = 0) -> Captions:
    """Captions of the scenes that training sees, numbered: a pure function of (bank, seed, index)."""
    from rfkernels.train.scenes import SceneSampler

    sampler = SceneSampler(bank, seed)

    def captions(first: int, count: int) -> list[str]:
        chunks = range(first // CHUNK, -(-(first + count) // CHUNK))
        batches = (sampler.scenes(chunk, 2 * CHUNK) for chunk in chunks)  # a tenth comes without a caption
        lines = [line for scenes in batches for line in [s.caption for s in scenes if s.caption][:CHUNK]]
        return lines[first % CHUNK :][:count]

    return captions


class Pairs:
    """The pairs of a folder: `captions`, `pictures` uint8[n, 4, size, size] mapped from the file, `keys`.

    Raises:
        ValueError: a folder without pairs.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "record.json").is_file():
            raise ValueError(
                f"a folder of pairs (record.json) is required, got {folder}: run make_pairs first"
            )
        self.record = json.loads((self.folder / "record.json").read_text())
        size = self.record["size"]
        lines = self.folder / "captions.jsonl"
        lines = lines.read_text().splitlines(keepends=True) if lines.is_file() else []
        self.captions = [json.loads(line) for line in lines if line.endswith("\n")]
        pictures = self.folder / "pictures.u8"
        stored = pictures.stat().st_size // (4 * size * size) if pictures.is_file() else 0
        self.captions = self.captions[:stored]
        shape = (len(self.captions), 4, size, size)
        self.pictures = (
            np.memmap(pictures, np.uint8, "r", shape=shape) if stored else np.empty(shape, np.uint8)
        )

    def __len__(self) -> int:
        return len(self.captions)

    def __reduce__(self):
        return Pairs, (self.folder,)  # a worker process maps the file itself

    def keys(self, rows: np.ndarray) -> Tensor:
        """int64[batch, 3]: the keys of the noise of these pairs."""
        seed = np.full_like(rows, self.record["seed"], dtype=np.int64)
        return torch.from_numpy(np.stack([seed, rows, np.zeros_like(seed)], 1).astype(np.int64))


def make_pairs(
    folder: str | Path,
    count: int = 50_000,
    *,
    weights: str | Path | None = None,
    bank=None,
    captions: Captions | None = None,
    seed: int = 0,
    device: str = "cpu",
    steps: int = 12,
    method: str = "ab2",
    guidance: float | None = None,
    shift: float | None = None,
    batch: int | None = None,
    dtype: str = "auto",
    minutes: float = float("inf"),
) -> Pairs:
    """Adds whole batches until a folder holds `count` pairs or the minutes are over; returns all of them.

    Args:
        folder: what is there already must be pairs of the same settings, and is kept.
        weights: of the teacher, which should be the averaged model; None: the package's own.
        bank, captions: where captions come from; None: the scenes of the bank, None: the default bank.
        seed: of noises and captions.
        steps, method, guidance, shift: of the teacher's sampler; None: what its weights say.
        batch: pairs that are made together, by default 32 on a CPU and 256 on a GPU. With it the rounding of
            a picture changes, noises and captions do not.
        dtype: of the teacher, as in `Pipeline.load`.

    Raises:
        ValueError: the folder holds pairs of other settings; the message names them.
    """
    folder, path, where = Path(folder), Path(weights or DEFAULT_WEIGHTS), torch.device(device)
    kind = resolve_dtype(dtype, where)
    teacher = load_emoji(path, device=where, dtype=kind)
    c = teacher.config
    guidance = c.guidance if guidance is None else float(guidance)
    shift = c.shift if shift is None else float(shift)
    batch = batch or (32 if where.type == "cpu" else 256)
    record = {"weights": digest_of(path), "size": c.size, "seed": seed, "steps": steps, "method": method}
    record |= {"guidance": guidance, "shift": shift, "dtype": str(kind), "batch": batch}
    _claim(folder, record)
    if captions is None:
        if bank is None:
            from rfkernels.train.glyphs import open_bank

            bank = open_bank()
        captions = scene_captions(bank, seed)
    sigmas = samplers.schedule("shift", steps, shift=shift)
    end = time.monotonic() + 60 * minutes
    done = _trimmed(folder, batch)
    while done < count and time.monotonic() < end:
        lines = [
            "" if i % BLANK == BLANK - 1 else line for i, line in enumerate(captions(done, batch), start=done)
        ]
        keys = noise_keys(seed, batch, first_sample=done, device=where)
        _append(folder, _pictures(teacher, lines, keys, sigmas, method, guidance), lines)
        done += batch
    return Pairs(folder)


@torch.inference_mode()
def _pictures(
    teacher: EmojiFlow, lines: list[str], keys: Tensor, sigmas, method: str, guidance: float
) -> Tensor:
    """uint8[batch, 4, size, size]: round(127.5 (x0 + 1)) of where the flow takes the noise of the keys."""
    c, guided = teacher.config, guidance != 1
    text = teacher.encode([""] * len(lines) + lines if guided else lines)

    def velocity(x: Tensor, sigma: Tensor):
        return teacher.guided(x, sigma, text) if guided else teacher(x, sigma, text)

    shape = (len(lines), c.channels, c.size, c.size)
    options = {"method": method, "guidance": guidance if guided else None}
    x0, _ = reflow_pairs(velocity, keys, shape, sigmas, **options)
    if not bool(x0.isfinite().all()):
        raise ValueError("the teacher's pictures must be finite: use a lower guidance or other weights")
    return ((x0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def _claim(folder: Path, record: dict) -> None:
    """Writes the record of a new folder, or compares it with that of an old one."""
    path = folder / "record.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1))
    found = json.loads(path.read_text())
    other = [f"{k} {found.get(k)!r}, not {v!r}" for k, v in record.items() if found.get(k) != v]
    if other:
        raise ValueError(f"pairs of the same settings are required in {folder}, it has {'; '.join(other)}")


def _trimmed(folder: Path, batch: int) -> int:
    """The pairs of the whole batches in a folder, after cutting off what a run left half written."""
    pairs = Pairs(folder)
    done = len(pairs) // batch * batch
    (folder / "captions.jsonl").write_text("".join(json.dumps(c) + "\n" for c in pairs.captions[:done]))
    with open(folder / "pictures.u8", "ab") as file:
        file.truncate(done * 4 * pairs.record["size"] ** 2)
    return done


def _append(folder: Path, pictures: Tensor, lines: list[str]) -> None:
    """Pictures first, so that a caption is never there without its picture."""
    for name, data in (
        ("pictures.u8", pictures.numpy().tobytes()),
        ("captions.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode()),
    ):
        with open(folder / name, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
