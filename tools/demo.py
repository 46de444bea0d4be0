"""What `make demo` runs once the package is installed: a sheet of 36 prompts and the cost of our steps.

    python tools/demo.py [--out out] [--device auto] [--steps N] [--seed 11]

The comparison is with the same sampler written in plain torch, on the same states and velocities, in the same
process, the two taking turns; the model is left out of it, since both would call the same one.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from rfkernels import png, samplers
from rfkernels.cli.sheet import enlarge, sheet
from rfkernels.ops import noise_keys, philox_normal
from rfkernels.pipeline import InputError, Pipeline

# Seen in training, then with attributes, composed, counted and placed, and in styles: the same seeds always.
PROMPTS = (
    "a red heart",
    "grinning face",
    "a cat face",
    "a panda",
    "a pizza",
    "a rocket",
    "a fox",
    "a sunflower",
    "a snowman",
    "a ghost",
    "a birthday cake",
    "a robot",
    "a green heart",
    "a purple apple",
    "a blue car",
    "a pink elephant",
    "a green dog face",
    "an orange butterfly",
    "a cat face wearing sunglasses",
    "a dog face wearing a top hat",
    "a panda wearing a crown",
    "a grinning face on a purple background",
    "a pizza on a green background",
    "a red heart on a blue background",
    "three red hearts",
    "two blue stars",
    "four lemons",
    "a dog left of a cat",
    "a star above a house",
    "a small star in the top left corner on a blue background",
    "a purple car",
    "a guitar turned upside down",
    "a crown 3d",
    "a fish flat",
    "rotes herz",
    "🐱 with 🕶️",
)
GUIDANCE = 3.0
ROUNDS = 15


def main() -> int:
    arguments = _parser().parse_args()
    try:
        png.check_target(_made(arguments.out) / "demo.png")
        pipe = Pipeline.load("emoji", device=arguments.device)
    except (InputError, png.PngError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    result = pipe(PROMPTS, steps=arguments.steps, seed=arguments.seed)
    used = result.parameters
    scale = max(1, 128 // pipe.model.config.size)
    page = sheet([enlarge(image, scale) for image in result.images], PROMPTS, 6)
    target = arguments.out / "demo.png"
    png.write_image(target, page, {**result.parameters, "scale": scale, "resample": "lanczos"})

    print(f"wrote {target.resolve()}")
    print(
        f"{len(PROMPTS)} pictures, {used['steps']} steps of {used['method']}, guidance {used['guidance']:g}, "
        f"on {pipe.device} in {used['dtype']}: loading {result.seconds['load']:.2f} s, "
        f"sampling {result.seconds['sample']:.2f} s"
    )
    for warning in result.warnings:
        print(f"note: {warning}")
    config = pipe.model.config
    print(f"the sampler's own time ({used['steps']} guided ab2 steps, model left out, median of {ROUNDS}):")
    small = (len(PROMPTS), config.channels, config.size, config.size)
    _compare("this sheet", small, used["steps"], pipe.device, result.seconds["sample"])
    _compare("16 latents of 1024 x 1024 FLUX", (16, 16, 128, 128), used["steps"], pipe.device)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Draw a sheet of 36 prompts and time the sampler.")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the sheet (default: out)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--seed", type=int, default=11)
    return parser


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot create the folder {folder}: {error.strerror}; choose another --out"
        ) from error
    return folder


def _compare(
    name: str, shape: tuple[int, ...], steps: int, device: torch.device, whole: float | None = None
) -> None:
    """Prints the times of our sampler and the eager one on a state of `shape`, and how far apart they end."""
    x, uncond, cond = (philox_normal(shape, noise_keys(seed, shape[0], device=device)) for seed in (1, 2, 3))
    sigmas = samplers.schedule("linear", steps)
    velocity = lambda x, sigma: (uncond, cond)
    ours = lambda: samplers.sample(velocity, x, sigmas, method="ab2", guidance=GUIDANCE)
    eager = lambda: eager_ab2(velocity, x, sigmas, GUIDANCE)
    apart = (ours() - eager()).abs().max().item()
    times: dict[str, list[float]] = {"ours": [], "eager": []}
    for _ in range(ROUNDS):
        times["ours"].append(_seconds(ours, device))
        times["eager"].append(_seconds(eager, device))
    ms = {side: 1e3 * statistics.median(values) for side, values in times.items()}
    share = f", {100 * ms['ours'] / 1e3 / whole:.1f} % of its sampling" if whole else ""
    print(
        f"  {name}: ours {ms['ours']:.2f} ms{share}, eager torch {ms['eager']:.2f} ms "
        f"({ms['eager'] / ms['ours']:.1f}x); results at most {apart:.0e} apart"
    )


def eager_ab2(
    velocity: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], x: Tensor, sigmas: Tensor, guidance: float
) -> Tensor:
    """Adams-Bashforth of order 2 with classifier-free guidance as one would write it in torch."""
    levels = sigmas.tolist()
    last: Tensor | None = None
    last_step = 0.0
    for now, then in pairwise(levels):
        sigma = torch.full((x.shape[0],), now, dtype=x.dtype, device=x.device)
        uncond, cond = velocity(x, sigma)
        v = uncond + guidance * (cond - uncond)
        step = then - now
        if last is None:
            x = x + step * v
        else:
            ratio = step / last_step
            x = x + step * ((1 + ratio / 2) * v - ratio / 2 * last)
        last, last_step = v, step
    return x


def _seconds(work: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
