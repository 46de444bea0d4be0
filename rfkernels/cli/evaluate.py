"""`rfkernels eval`: the scores of a model on captions it has not seen."""

from pathlib import Path
from typing import Annotated

import typer

from rfkernels.cli.console import print_json
from rfkernels.cli.files import file_errors
from rfkernels.cli.train import require_known

__all__ = ["evaluate"]

_help = typer.Option


def evaluate(
    model: Annotated[str, typer.Argument(help="What to score: emoji.")],
    weights: Annotated[Path | None, _help(help="A weights file instead of the one in the package.")] = None,
    lora: Annotated[Path | None, _help(help="Adapters for few steps; scores with and without.")] = None,
    data: Annotated[Path | None, _help(help="The data: its file, or folder [~/.cache/rfkernels].")] = None,
    steps: Annotated[int | None, _help(help="Solver steps [the model's own].")] = None,
    guidance: Annotated[float | None, _help(help="Pull to the prompt [the model's own].")] = None,
    count: Annotated[int, _help(help="Scenes of each kind.")] = 32,
    kinds: Annotated[str | None, _help(help="Kinds of scenes, with commas between [all].")] = None,
    sheet: Annotated[Path | None, _help(help="A picture of the samples, marked right or wrong.")] = None,
    quick: Annotated[bool, _help("--quick", help="Four scenes of each kind and a hasty judge.")] = False,
    device: Annotated[str, _help(help="auto, cpu, cuda, cuda:N.")] = "auto",
    json: Annotated[bool, _help("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Score a model with fixed seeds; see its model card for what the numbers mean."""
    require_known(model)
    from rfkernels.evaluation import emoji, report
    from rfkernels.pipeline import resolve_device

    chosen = emoji.EVALUATED if kinds is None else tuple(kinds.replace(",", " ").split())
    with file_errors():
        scores = emoji.evaluate(
            weights, device=resolve_device(device), data=data, lora=lora, steps=steps, guidance=guidance,
            count=min(count, 4) if quick else count, kinds=chosen, quick=quick, sheet=sheet,
        )  # fmt: skip
    if json:
        print_json(scores)
    else:
        print(report.table(scores))
