"""`rfkernels inspect`: what a file of weights holds."""

from pathlib import Path
from typing import Annotated, Any

import typer

from rfkernels.cli.console import print_json
from rfkernels.cli.files import file_errors, printable

__all__ = ["inspect"]


def inspect(
    file: Annotated[
        Path, typer.Argument(help="A safetensors or GGUF file, an index, a directory of shards.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List the tensors too.")] = False,
) -> None:
    """Say which model FILE holds and how: family, naming, format, dtypes, blocks. No weight is read."""
    from rfkernels.formats.detect import listing
    from rfkernels.formats.summary import summarise

    with file_errors():
        summary = summarise(file)
        names = listing(file) if tensors else None
    rows = {}
    for name, shape in names.shapes.items() if names else ():
        rows[name] = {"dtype": str(names.dtypes[name]).removeprefix("torch."), "shape": list(shape)}
    if json:
        print_json({"file": str(file), **summary, **({"tensor_list": rows} if tensors else {})})
        return
    for line in (*_lines(summary), *(f"{name}  {row['dtype']}{row['shape']}" for name, row in rows.items())):
        print(printable(line))


def _lines(found: dict[str, Any]) -> list[str]:
    model = f"{found['family']} {found['variant']}".strip() if found["family"] else "unknown"
    lines = [f"model     {model}" + (f"  ({found['class']})" if found["class"] else "")]
    if found["family"]:
        prefix = f", prefix {found['prefix']}" if found["prefix"] else ""
        lines += [f"naming    {found['naming']}{prefix}"]
        lines += [f"config    {', '.join(f'{key}={value!r}' for key, value in found['config'].items())}"]
    lines += [f"format    {found['format']}", f"total     {_amounts(found)}"]
    for title, groups in (("dtype", found["dtypes"]), ("blocks", found["blocks"])):
        width = max(map(len, groups), default=0)
        for name, group in groups.items():
            times = f"  x {group['blocks']}" if name.endswith(".*") else ""
            lines.append(f"{title:8}  {name:{width}}  {_amounts(group)}{times}")
    return lines + [f"metadata  {key}: {_short(value)}" for key, value in found["metadata"].items()]


def _amounts(group: dict[str, int]) -> str:
    return f"{group['tensors']:,} tensors, {group['parameters']:,} parameters, {group['bytes']:,} bytes"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}... ({len(text):,} characters)"
