"""The embedded model's linear layers in every format of `rfkernels.quantize`: what each layer loses, what the
velocity and a finished picture lose.

python -m bench.quantise -o bench/results/quantise-emoji.md
"""

import argparse
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch

import rfkernels
from bench import machine
from rfkernels import samplers
from rfkernels.models.emoji import EmojiFlow, load_emoji
from rfkernels.quantization.report import Report

METHODS = ("int8", "int8-convrot", "fp8", "w4a16", "w4a8", "svdq-int4")
PROMPTS = ["a red heart on a yellow background", "a blue star", "a green car", "a purple cat"]
STEPS = 8


def pictures(model: EmojiFlow) -> tuple[torch.Tensor, torch.Tensor]:
    """The velocity at the first step, and four pictures of as many prompts."""
    text = model.encode(PROMPTS)
    config = model.config
    generator = torch.Generator().manual_seed(0)
    shape = (len(PROMPTS), config.channels, config.size, config.size)
    x = torch.randn(shape, generator=generator)
    sigmas = samplers.schedule("shift", STEPS, shift=1.0)
    with torch.no_grad():
        velocity = model(x, sigmas[:1].expand(len(x)).contiguous(), text)
        result = samplers.sample(
            lambda x, sigma: model(x, sigma.expand(len(x)), text), x, sigmas, method="ab2"
        )
    return velocity, result.clamp(-1, 1)


def measure() -> Iterator[tuple[str, Report, float, float]]:
    """Method, report, relative L2 of the velocity, root mean square of the pictures' difference (of 2)."""
    model = load_emoji()
    velocity, picture = pictures(model)
    for method in METHODS:
        quantised = deepcopy(model)
        report = rfkernels.quantize(quantised, method)
        v, p = pictures(quantised)
        yield (
            method,
            report,
            ((v - velocity).norm() / velocity.norm()).item(),
            (p - picture).square().mean().sqrt().item(),
        )


def page() -> str:
    """The Markdown page."""
    results = list(measure())
    commit = machine.commit()
    at = (commit["id"] or "unknown")[:12] + (" with changes" if commit["dirty"] else "")
    parts = [
        "# The embedded model, quantised",
        f"{machine.now()}, commit {at}, torch {torch.__version__}, `python -m bench.quantise`",
        "Without calibration; velocity: relative L2 of the first step; picture: root mean square of the "
        f"difference of four pictures after {STEPS} steps, on a scale from -1 to 1.",
        "| method | bytes | velocity | picture | worst layer | dB |\n"
        "| --- | ---: | ---: | ---: | --- | ---: |",
    ]
    for method, report, velocity, picture in results:
        worst = report.worst
        share = report.bytes_after / report.bytes_before
        lost = f"{velocity:.2%} | {picture:.4f} | {worst.name} | {worst.snr_db:.1f}"
        parts[-1] += f"\n| {method} | {share:.0%} | {lost} |"
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
