"""`rfkernels convert`: the names and dtypes of a file of weights."""

from pathlib import Path
from typing import Annotated

import typer

from rfkernels.cli.console import note
from rfkernels.cli.files import DTYPES, dtype_of, file_errors, size_of

__all__ = ["convert"]


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A safetensors or GGUF file, or shards.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A safetensors file.")],
    to: Annotated[str | None, typer.Option(help="diffusers or original names; default: those of IN.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}; quantised layers are decoded to it.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Quantise linear layers: int8-convrot and others, see quantize.")
    ] = None,
    layout: Annotated[str, typer.Option(help="Of quantised layers: native or comfy.")] = "native",
    prefix: Annotated[str, typer.Option(help="Of all names in OUT.")] = "",
    shard_size: Annotated[str | None, typer.Option(help="Write shards of at most, say, 5GB.")] = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing.")] = False,
) -> None:
    """Write the weights of IN to OUT under other names or in another dtype, tensor by tensor."""
    limit, dtype = size_of(shard_size), dtype_of(dtype)
    from rfkernels.formats.convert import convert as run

    options = {"to": to, "dtype": dtype, "method": method, "layout": layout, "prefix": prefix}
    with file_errors():
        run(source, target, max_shard_bytes=limit, **options)
    note(f"wrote {target}", quiet=quiet)
