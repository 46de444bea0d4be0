"""`rfkernels train`: the phases of making a model that ships with the package."""

from pathlib import Path
from typing import Annotated

import typer

from rfkernels.cli.console import UserError, note

__all__ = ["train"]

_CONFIGS = ("small", "full")
_option = typer.Option


def train(
    model: Annotated[str, typer.Argument(help="What to train: emoji.")],
    phase: Annotated[str, _option(help="flow, reflow, distil or lora.")] = "flow",
    config: Annotated[str, _option(help="Shape and recipe for flow: small (CPU), full (GPU).")] = "small",
    minutes: Annotated[
        float | None, _option(help="Time to spend, over all legs [the recipe's].", show_default=False)
    ] = None,
    leg: Annotated[
        float | None, _option(help="Minutes of this part; --resume goes on [all].", show_default=False)
    ] = None,
    steps: Annotated[int | None, _option(help="A number of steps instead of minutes.")] = None,
    batch: Annotated[int | None, _option(help="Pictures a step [the recipe's].")] = None,
    seed: Annotated[int, _option("-s", "--seed", help="Of scenes, noise and first weights.")] = 0,
    out: Annotated[Path, _option(help="Folder of checkpoints, sample sheets, log and weights.")] = Path(
        "runs/emoji"
    ),
    data: Annotated[
        Path | None, _option(help="FILE.pack of the glyphs, or their folder [~/.cache/rfkernels].")
    ] = None,
    resume: Annotated[bool, _option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    start: Annotated[
        Path | None,
        _option("--from", help="Weights to start from [flow: random numbers; else the package's own]."),
    ] = None,
    pairs: Annotated[
        Path | None, _option(help="Folder of pairs for reflow and distil [made in OUT/pairs].")
    ] = None,
    count: Annotated[int, _option("-n", "--count", help="Pairs to make.")] = 50_000,
    style: Annotated[str, _option(help="Of a LoRA: pixel, outline, glow.")] = "pixel",
    rank: Annotated[int, _option(help="distil: of a LoRA for few steps; 0: new weights.")] = 0,
    device: Annotated[str, _option(help="auto, cpu, cuda, cuda:N.")] = "auto",
    workers: Annotated[int, _option(help="Processes that make scenes ahead.")] = 0,
) -> None:
    """Train a model, or a leg of it; its data is fetched through the npm client on the first run."""
    from rfkernels.train.phases import PHASES, STYLES, run_phase

    require_known(model)
    _one_of("phase", phase, PHASES)
    _one_of("config", config, _CONFIGS)
    _one_of("style", style, STYLES)
    _positive(minutes=minutes, leg=leg, steps=steps, batch=batch, count=count)
    if min(rank, workers, seed) < 0:
        raise UserError(f"rank, workers and seed must not be negative, got {rank}, {workers}, {seed}")
    _require_checkpoint(out / "last.pt", resume)
    _require_files(data, start)
    from rfkernels.settings import resolve_device

    where = str(resolve_device(device))
    _make(out)
    try:
        made = run_phase(
            phase, out, preset=config, minutes=minutes, leg=leg, steps=steps, batch=batch, seed=seed,
            data=data, start=start, pairs=pairs, count=count, style=style, rank=rank, resume=resume,
            device=where, workers=workers,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from error
    print(made)
    option = "--lora" if phase == "lora" or (phase == "distil" and rank) else "--weights"
    note(f'try it: rfkernels generate "a red heart" {option} {made}')


def _require_files(data: Path | None, start: Path | None) -> None:
    for option, path in {"--data": data, "--from": start}.items():
        if path is not None and not path.exists() and (option == "--from" or path.suffix == ".pack"):
            raise UserError(f"{option} {path} does not exist: check the name")


def _require_checkpoint(last: Path, resume: bool) -> None:
    if resume and not last.exists():
        raise UserError(f"there is no checkpoint {last}: start without --resume")


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {out}: {error.strerror}; choose another --out") from error


def require_known(model: str) -> None:
    if model != "emoji":
        raise UserError(f"unknown model {model!r}: use emoji")


def _positive(**numbers: float | None) -> None:
    for name, value in numbers.items():
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} must be a positive number, got {value:g}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"unknown {name} {value!r}: use one of {', '.join(known)}")
