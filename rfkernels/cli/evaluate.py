"""`rfkernels eval`: the scores of a model on captions it has not seen."""

from pathlib import Path
from typing import Annotated

import typer

from rfkernels.cli.console import print_json
from rfkernels.cli.train import require_known

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[str, typer.Argument(help="What to score: emoji.")],
    weights: Annotated[
        Path | None, typer.Option(help="A weights file instead of the one in the package.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The training data, for the scores that need it.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Score a model with fixed seeds; see its model card for what the numbers mean."""
    require_known(model)
    from rfkernels.evaluation import emoji
    from rfkernels.pipeline import resolve_device

    scores = emoji.evaluate(weights, device=resolve_device(device), data=data)
    if json:
        print_json(scores)
        return
    width = max(map(len, scores))
    for name, value in scores.items():
        print(f"{name:{width}}  {value:.4g}" if isinstance(value, float) else f"{name:{width}}  {value}")
