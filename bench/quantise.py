"""The embedded model's linear layers in every format of `rfkernels.quantize`: what each layer loses, what the
velocity and a finished picture lose.

python -m bench.quantise -o bench/results/quantise-emoji.md
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import machine
from rfkernels.evaluation.draw import draw
from rfkernels.evaluation.forms import bytes_of, form_of
from rfkernels.evaluation.quality import psnr
from rfkernels.models.emoji import EmojiFlow, load_emoji
from rfkernels.ops import noise_keys, philox_normal
from rfkernels.quantization.report import Report

METHODS = ("int8", "int8-convrot", "fp8", "w4a16", "w4a8", "svdq-int4")
PROMPTS = ["a red heart on a yellow background", "a blue star", "a green car", "a purple cat"]
STEPS = 8


def pictures(model: EmojiFlow) -> tuple[torch.Tensor, torch.Tensor]:
    """The velocity at the first step without guidance, and the pictures of `draw`."""
    c, n = model.config, len(PROMPTS)
    x = philox_normal((n, c.channels, c.size, c.size), noise_keys(list(range(n)), n))
    with torch.no_grad():
        velocity = model(x, torch.ones(n), model.encode(PROMPTS))
    return velocity, draw(model, PROMPTS, seed=0, steps=STEPS)


def measure() -> Iterator[tuple[str, Report, int, float, float]]:
    """Method, report, bytes of the model, relative L2 of the velocity, dB of the pictures."""
    model = load_emoji()
    velocity, picture = pictures(model)
    for method in METHODS:
        quantised, report = form_of(model, method)
        v, p = pictures(quantised)
        lost = ((v - velocity).norm() / velocity.norm()).item()
        yield method, report, bytes_of(quantised), lost, psnr(p, picture).mean().item()


def page() -> str:
    """The Markdown page."""
    results = list(measure())
    commit = machine.commit()
    at = (commit["id"] or "unknown")[:12] + (" with changes" if commit["dirty"] else "")
    parts = [
        "# The embedded model, quantised",
        f"{machine.now()}, commit {at}, torch {torch.__version__}, `python -m bench.quantise`",
        "Without calibration; layers: bytes of the linear layers; velocity: relative L2 of the first step; "
        f"picture: dB of four pictures after {STEPS} steps, against those of float32.",
        "| method | layers | model | velocity | picture | worst layer | dB |\n"
        "| --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for method, report, size, velocity, picture in results:
        worst = report.worst
        share = report.bytes_after / report.bytes_before
        lost = f"{velocity:.2%} | {picture:.1f} dB | {worst.name} | {worst.snr_db:.1f}"
        parts[-1] += f"\n| {method} | {share:.0%} | {size / 1e6:.1f} MB | {lost} |"
    for method, report, *_ in results:
        parts += [f"## {method}", f"```\n{report}\n```"]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m bench.quantise", description=__doc__)
    parser.add_argument("-o", metavar="FILE", help="write the page to FILE; default: print it")
    args = parser.parse_args()
    if args.o:
        Path(args.o).write_text(page())
    else:
        print(page())
