"""One leg of training the embedded model on a machine that is there for minutes: from parts to parts.

`bench/train_embedded.sh` calls it; see there for the budget of bytes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from rfkernels.train import loop, parts
from rfkernels.train.phases import PHASES, run_phase

ROOT = Path(__file__).resolve().parent.parent
NAME = "last.pt"  # of the checkpoint
TRAVELS = 64 * 2**20  # bytes there: repository, pack and checkpoint
RETURNS = 64 * 2**20  # bytes back,
FILES = 8  # in this many files
RESERVE = 0.5  # minutes at the end for the weights and the checkpoint, at most a quarter of all


def main() -> int:
    a = _parser().parse_args()
    try:
        check_travel(ROOT, a.checkpoint, a.pack)
        if a.check:
            return 0
        made = leg(
            a.out, a.phase, checkpoint=a.checkpoint, until=a.begun + 60 * a.minutes, data=a.pack,
            device=a.device, total=a.total, steps=a.steps, batch=a.batch, preset=a.config, start=a.start,
            style=a.style, rank=a.rank, count=a.count, compile=a.compile, workers=a.workers,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"train_leg: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{path.stat().st_size:>10} {path.name}" for path in made))
    return 0


def leg(
    out: Path,
    phase: str,
    *,
    checkpoint: Path | None = None,
    until: float,
    total: float | None = None,
    run=run_phase,
    largest: int = parts.LARGEST,
    **options,
) -> list[Path]:
    """Trains from `checkpoint` (parts, or weights) until the time `until`; returns the files in `out`.

    total: minutes of all legs together. run: the phase, called as `run_phase`.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        resume = checkpoint is not None and checkpoint.is_dir()
        if resume:
            parts.join(checkpoint, NAME, work / NAME)
            if (checkpoint / "log.jsonl").exists():
                shutil.copy(checkpoint / "log.jsonl", work)
        elif checkpoint is not None:
            options["start"] = checkpoint
        left = max((until - time.time()) / 60, 0.0)
        minutes = max(left - min(RESERVE, left / 4), 0.001)
        print(f"leg of {minutes:.2f} minutes, {'goes on' if resume else 'begins'}", flush=True)
        made = run(phase, work, leg=minutes, minutes=total, resume=resume, **options)
        return collect(work, made, out, largest)


def collect(work: Path, made: Path, out: Path, largest: int = parts.LARGEST) -> list[Path]:
    """Weights, log, last sheet and the checkpoint in parts, the whole one if it fits, else a compact one."""
    kept = [made, work / "log.jsonl", *sorted(work.glob("sheet_*.png"))[-1:]]
    files = [Path(shutil.copy(path, out)) for path in kept if path.exists()]
    used = sum(path.stat().st_size for path in files)
    most = FILES - len(files) - 2  # beside the manifest and the scores
    room = min(most * largest, RETURNS - used - 2**20)
    last = work / NAME
    if last.stat().st_size > room:
        compact(last)
    size = last.stat().st_size
    if size > room or made.stat().st_size > 16 * 2**20:
        raise ValueError(
            f"too much to bring back: a checkpoint of {size} bytes where {room} are left, "
            f"weights of {made.stat().st_size} bytes where {16 * 2**20} are allowed"
        )
    return files + parts.split(last, out, largest=largest, most=most)


def compact(last: Path) -> None:
    """Replaces a whole checkpoint by its averaged weights as int8 rows, which `restore` takes as well."""
    _, record = loop.read_checkpoint(last)
    if "rows" not in record:
        record["rows"] = loop.as_rows(record["ema"])
    for name in ("model", "ema", "muon", "adam", "begun"):
        record.pop(name, None)
    torch.save(record, last)


def check_travel(root: Path, checkpoint: Path | None, pack: Path | None) -> dict[str, int]:
    """Bytes of what goes to the other machine; raises ValueError with the numbers when it is too much."""
    sizes = {"repository": _repository_bytes(root), "pack": _bytes(pack), "checkpoint": _bytes(checkpoint)}
    told = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items())
    if sum(sizes.values()) > TRAVELS:
        raise ValueError(f"{told}: more than {TRAVELS / 2**20:.0f} MiB together; use a compact checkpoint")
    print(f"{told}: {sum(sizes.values()) / 2**20:.1f} of {TRAVELS / 2**20:.0f} MiB", flush=True)
    return sizes


def _repository_bytes(root: Path) -> int:
    """Of the files that git knows; where there is no git, of the files but for build outputs."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=False)
    if listed.returncode == 0:
        paths = [root / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    else:
        built = {"build", ".git", ".venv", "__pycache__"}
        paths = [p for p in root.rglob("*") if p.suffix != ".so" and built.isdisjoint(p.parts)]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _bytes(path: Path | None) -> int:
    if path is None:
        return 0
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="One leg of training, from parts to parts.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--phase", default="flow", choices=PHASES)
    parser.add_argument("--checkpoint", type=Path, help="folder of an earlier leg, or a weights file")
    parser.add_argument("--pack", type=Path, help="the glyphs")
    parser.add_argument("--begun", type=float, default=time.time(), help="when the machine's time began")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this leg, from then")
    parser.add_argument("--total", type=float, help="minutes of all legs together")
    parser.add_argument("--steps", type=int, help="of all legs together, instead of minutes")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--config", default="full")
    parser.add_argument("--start", type=Path, help="the weights that reflow, distil or lora began with")
    parser.add_argument("--style", default="pixel")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--count", type=int, default=50_000, help="pairs of reflow and distil")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--check", action="store_true", help="only check the bytes that travel")
    return parser


if __name__ == "__main__":
    sys.exit(main())
