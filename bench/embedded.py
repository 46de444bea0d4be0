"""The embedded model on the fused ops beside plain torch: training steps, sampling, and steps as CUDA graphs.

python -m bench.embedded -o bench/results/<machine>-embedded.md
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

import rfkernels
from bench import machine
from rfkernels import samplers
from rfkernels.memory import GraphRunner
from rfkernels.models import blocks, emoji
from rfkernels.models.emoji import EmojiConfig, EmojiFlow

SHAPES = {
    "64 px, 64 tokens": EmojiConfig(),
    "128 px, 64 tokens": EmojiConfig(size=128, patch=16),
    "128 px, 256 tokens": EmojiConfig(size=128, patch=8),
    "128 px, 256 tokens, width 320": EmojiConfig(size=128, width=320, heads=5, single_blocks=6),
}
KITS = {"plain": blocks.PLAIN, "fused": blocks.FUSED}
TINY = EmojiConfig(
    size=16, patch=4, width=64, heads=1, mlp=2, double_blocks=1, single_blocks=1, table=64, embed=16
)
Calls = dict[str, Callable[[], object]]


@contextmanager
def through(kit: str) -> Iterator[None]:
    """Blocks compute by that kit, whatever the device and the gradient."""
    chosen = blocks.kit_of
    blocks.kit_of = emoji.kit_of = lambda x: KITS[kit]
    try:
        yield
    finally:
        blocks.kit_of = emoji.kit_of = chosen


def model_of(config: EmojiConfig, device: str) -> EmojiFlow:
    """Random weights without zeros that hide work."""
    torch.manual_seed(0)
    model = EmojiFlow(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.to(device)


def inputs(model: EmojiFlow, batch: int) -> tuple[Tensor, ...]:
    c, device = model.config, model.out.weight.device
    text = model.encode(["a red heart on a blue background", "cat"] * ((batch + 1) // 2))
    x = torch.randn(batch, c.channels, c.size, c.size, device=device)
    sigma = torch.linspace(0.02, 0.98, batch, device=device)
    return x, sigma, text.rows[:batch], text.weights[:batch], text.mask[:batch]


def in_turns(calls: Calls, rounds: int) -> dict[str, tuple[float, float]]:
    """Medians of (wall-clock, CPU) seconds of each call, after one that is not counted."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                samples[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {n: tuple(map(statistics.median, zip(*s, strict=True))) for n, s in samples.items()}


def training_calls(config: EmojiConfig, device: str, batch: int, compile: bool) -> Calls:
    """A forward and backward pass in bfloat16 of float32 weights, by each kit."""
    model = model_of(config, device)
    data = inputs(model, batch)

    def call(kit: str, compiled: bool) -> Callable[[], object]:
        def loss(*args: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                return model.predict(*args).float().square().mean()

        run = torch.compile(loss) if compiled else loss

        def step() -> None:
            with through(kit):
                run(*data).backward()
            model.zero_grad(set_to_none=True)

        return step

    modes = {"": False, ", compiled": True} if compile else {"": False}
    return {f"{kit}{name}": call(kit, on) for kit in KITS for name, on in modes.items()}


def sampling_calls(config: EmojiConfig, device: str, batch: int, steps: int) -> Calls:
    """Guided pictures of `batch` prompts in bfloat16 and int8; on CUDA steps are replayed."""
    model = model_of(config, device).bfloat16().eval().requires_grad_(False)
    model.rotation = blocks.rope_table(model.grid, model.head_dim).to(device)
    quantised = deepcopy(model)
    rfkernels.quantize(quantised, "int8")
    noise = inputs(model, batch)[0]
    text = model.encode([""] * batch + ["a red heart"] * batch)
    sigmas = samplers.schedule("linear", steps)

    def call(kit: str, model: EmojiFlow) -> Callable[[], object]:
        run = GraphRunner(model.velocity)
        tokens = (text.rows, text.weights, text.mask)
        guided = lambda x, s: run(torch.cat([x, x]), torch.cat([s, s]), *tokens).chunk(2)

        @torch.inference_mode()
        def sample() -> Tensor:
            with through(kit):
                return samplers.sample(guided, noise, sigmas, method="ab2", guidance=3.0)

        return sample

    return {"plain": call("plain", model), "fused": call("fused", model), "int8": call("fused", quantised)}


def page(
    device: str, rounds: int, compile: bool, shapes: dict[str, EmojiConfig], batches: tuple[int, int, int]
) -> str:
    """The Markdown page; `batches` of training, of a sheet, of throughput."""
    train, sheet, many = batches
    found = machine.machine(device)
    parts = [
        "# The embedded model: fused ops beside plain torch",
        f"{machine.now()}, {found['cpu']}, {found['cores']} cores (load {found['load_average']}), "
        f"torch {torch.__version__}, commit {(machine.commit()['id'] or 'unknown')[:12]}. "
        f"Medians of {rounds} calls in turns in one process, random weights; CPU seconds are of all threads "
        "and say more than the clock where other work shares the machine.",
        "## Training: forward and backward, bfloat16 autocast of float32 weights",
    ]
    rows = [f"| shape, batch {train} | side | images/s | CPU s |", "| --- | --- | ---: | ---: |"]
    for name, config in shapes.items():
        for side, (wall, cpu) in in_turns(training_calls(config, device, train, compile), rounds).items():
            rows.append(f"| {name} | {side} | {train / wall:.1f} | {cpu:.3f} |")
    parts += ["\n".join(rows), "## Sampling with guidance"]
    rows = ["| shape | pictures | steps | side | ms | CPU ms |", "| --- | ---: | ---: | --- | ---: | ---: |"]
    for name, config in shapes.items():
        for batch, steps in ((1, 1), (1, 4), (1, 25), (sheet, 4), (many, 4)):
            for side, (wall, cpu) in in_turns(sampling_calls(config, device, batch, steps), rounds).items():
                rows.append(f"| {name} | {batch} | {steps} | {side} | {1e3 * wall:.1f} | {1e3 * cpu:.1f} |")
    return "\n\n".join([*parts, "\n".join(rows)]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.embedded", description=__doc__)
    parser.add_argument("-o", metavar="FILE", help="write the page to FILE; default: print it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, once")
    args = parser.parse_args(arguments)
    if args.smoke:
        text = page(args.device, 1, False, {"tiny": TINY}, (2, 2, 2))
    else:
        text = page(args.device, args.rounds, not args.no_compile, SHAPES, (128, 16, 64))
    if args.o:
        Path(args.o).write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
