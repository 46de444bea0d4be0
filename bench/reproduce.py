"""Whether the trainer of the embedded model gives the same score again: small runs side by side.

    python -m bench.reproduce --data emoji-128.pack [--steps 300] [--seeds 0 0 1 2] [--md FILE]

Each run trains a small model of 32-pixel pictures from random numbers. Runs of one seed have to agree to the
bit on one machine; runs of other seeds say how far a score moves by chance.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from rfkernels.models.emoji import EmojiConfig, EmojiFlow
from rfkernels.train import emoji, loop
from rfkernels.train.glyphs import Bank, open_bank

CONFIG = EmojiConfig(
    size=32, patch=4, width=128, heads=2, double_blocks=1, single_blocks=2, styles=emoji.STYLES
)


def scores(bank: Bank, seed: int, steps: int) -> dict[str, float]:
    """Velocity errors, on fixed scenes, of the averaged model of a run."""
    recipe = loop.Recipe(steps=steps, batch=64, seed=seed, warmup=20)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        last = emoji.train(out, config=CONFIG, recipe=recipe, bank=bank, compile=False, report_minutes=1e6)
        state = loop.new_state(EmojiFlow(loop.read_checkpoint(last)[0]), recipe, torch.device("cpu"))
        loop.restore(state, last)
        task = emoji.FlowTask(bank, CONFIG, loop.Recipe(batch=64), emoji.Levels(), torch.device("cpu"))
        return task.report(state, out)


def table(runs: list[tuple[int, dict[str, float]]]) -> str:
    """Markdown: a line a run, the spread of the seeds below."""
    names = list(runs[0][1])
    lines = ["| seed | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    lines += [f"| {seed} | " + " | ".join(f"{s[n]:.5f}" for n in names) + " |" for seed, s in runs]
    distinct = list(dict(runs).values())
    if len(distinct) > 1:
        spread = [statistics.stdev(s[n] for s in distinct) for n in names]
        lines.append("| standard deviation over seeds | " + " | ".join(f"{s:.5f}" for s in spread) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the data or its .pack file")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 0, 1, 2])
    parser.add_argument("--md", type=Path, help="write the table there")
    arguments = parser.parse_args()
    bank = open_bank(arguments.data, size=32)
    runs = [(seed, scores(bank, seed, arguments.steps)) for seed in arguments.seeds]
    same = all(s == dict(runs)[seed] for seed, s in runs)
    text = f"{table(runs)}\n\nRuns of one seed agree to the bit: {'yes' if same else 'no'}."
    print(text)
    if arguments.md:
        arguments.md.write_text(text + "\n")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
