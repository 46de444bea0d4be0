"""`rfkernels quantize`: a file of weights with quantised linear layers, from that file alone."""

from pathlib import Path
from typing import Annotated

import typer

from rfkernels.cli.console import note
from rfkernels.cli.files import DTYPES, dtype_of, file_errors, size_of

__all__ = ["quantize"]


def quantize(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A safetensors or GGUF file, or shards.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A safetensors file.")],
    method: Annotated[str, typer.Option(help="int8, int8-convrot, fp8, w4a16, w4a8, svdq-int4.")],
    modulation: Annotated[
        str | None, typer.Option(help="The format of modulation layers; default: they stay.")
    ] = None,
    group: Annotated[
        int | None, typer.Option(help="Inputs that share a scale, of the 4-bit methods.")
    ] = None,
    rotation: Annotated[int | None, typer.Option(help="256, 64 or 16, of int8-convrot and w4a8.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of svdq-int4.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Layers that stay: patterns, repeatable.")] = None,
    min_size: Annotated[int, typer.Option(help="Layers with fewer weights stay.")] = 1 << 14,
    layout: Annotated[str, typer.Option(help="native (load_quantized) or comfy (ComfyUI).")] = "native",
    to: Annotated[str | None, typer.Option(help="diffusers or original names.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Of what stays: {', '.join(DTYPES)}.")] = None,
    shard_size: Annotated[str | None, typer.Option(help="Write shards of at most, say, 5GB.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Quantise the linear layers of IN into OUT, layer by layer, and report what each lost."""
    limit, dtype = size_of(shard_size), dtype_of(dtype)
    from rfkernels.formats.convert import convert

    given = {"group": group, "rotation": rotation, "rank": rank}
    options = {key: value for key, value in given.items() if value is not None}
    rules = {"skip": tuple(skip or ()), "modulation": modulation, "min_size": min_size}
    with file_errors():
        report = convert(
            source,
            target,
            to=to,
            dtype=dtype,
            method=method,
            layout=layout,
            max_shard_bytes=limit,
            **rules,
            **options,
        )
    print(report.to_json() if json else report)
    note(f"wrote {target}")
