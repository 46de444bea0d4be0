"""`rfkernels plan`: what of a model fits where, from its header."""

from pathlib import Path
from typing import Annotated

import typer

from rfkernels.cli.console import UserError

__all__ = ["plan"]


def plan(
    model: Annotated[Path, typer.Argument(help="A safetensors or GGUF file, an index, or a folder.")],
    vram: Annotated[
        str | None, typer.Option("--vram", help="Free memory of the GPU: 8G (GiB), 7.5G, 8GB.")
    ] = None,
    ram: Annotated[str | None, typer.Option("--ram", help="Free memory of the host: 16G.")] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="The board, for times: rtx4060, orin-nano, h100 and others.")
    ] = None,
    resolution: Annotated[
        str | None, typer.Option("--resolution", help="Width x height in pixels. [default: 1024x1024]")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Tokens of a video, in its place.")] = None,
    text_tokens: Annotated[int, typer.Option("--text-tokens", help="Tokens of text.")] = 512,
    batch: Annotated[int, typer.Option("--batch", "-b", help="Samples a pass: 2 with guidance.")] = 1,
    quant: Annotated[
        str | None, typer.Option("--quant", help="Format of linear layers: int8-convrot, w4a16 and others.")
    ] = None,
    modulation: Annotated[
        str | None, typer.Option("--modulation", help="Format of linears that make scales and gates.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Steps of a picture.")] = 28,
    ahead: Annotated[int, typer.Option("--ahead", help="Layers copied while another runs.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Print what of MODEL fits on a GPU, what would be streamed, and how fast a step can be at best.

    Exit code 1 where it does not fit.
    """
    from rfkernels.memory import plan as make_plan

    try:
        made = make_plan(
            model,
            vram=vram,
            ram=ram,
            gpu=gpu,
            tokens=tokens,
            resolution=resolution,
            text_tokens=text_tokens,
            batch=batch,
            quant=quant,
            modulation=modulation,
            steps=steps,
            ahead=ahead,
        )
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    print(made.to_json() if json else made)
    if not made.fits:
        raise typer.Exit(1)
