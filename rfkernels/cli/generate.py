"""`rfkernels generate`: prompts to a picture or a sheet, with the parameters in the file."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image

from rfkernels import png
from rfkernels.cli import sheet as sheets
from rfkernels.cli.console import UserError, note, print_json, progress_bar
from rfkernels.cli.preview import colour_depth, preview
from rfkernels.cli.request import Request, settle

if TYPE_CHECKING:
    from rfkernels.pipeline import Result

__all__ = ["generate"]

_SINGLE_SIDE = 256  # pixels of a picture on its own, unless --scale says otherwise
_SHEET_SIDE = 128  # of each picture on a sheet
_MAX_PIXELS = 64_000_000  # of a sheet

_help = typer.Option
Prompts = Annotated[list[str] | None, typer.Argument(help='What to draw: "a red heart" "a blue star"')]
Count = Annotated[int | None, _help("-n", "--count", help="Pictures of each prompt [1].")]
Output = Annotated[
    Path | None, _help("-o", "--output", help="File: .png, .webp, .jpg [<prompt>_<seed>.png].")
]
Steps = Annotated[int | None, _help(help="Solver steps [the model's own].")]
Method = Annotated[str | None, _help(help="Solver: euler, midpoint, heun, rk4, ab2 [the model's own].")]
Guidance = Annotated[
    float | None, _help("--guidance", "--cfg-scale", help="Pull to the prompt; 1 is off [the model's own].")
]
Seed = Annotated[int | None, _help("-s", "--seed", help="Picture i uses SEED + i; -1 is random [-1].")]
Schedule = Annotated[str | None, _help(help="Noise levels: linear, shift, karras, ... [the model's own].")]
Shift = Annotated[float | None, _help(help="Chooses schedule shift; > 1: more steps near the noise.")]
Style = Annotated[str | None, _help(help="A style word of the model.")]
Lora = Annotated[
    list[str] | None, _help("--lora", help="NAME or FILE, and :STRENGTH if not 1; may be given again.")
]
Few = Annotated[
    bool | None, _help("--few/--no-few", help="The adapter for few steps [where there is one, to 4 steps].")
]
Size = Annotated[int | None, _help(help="Pixels a side; the model knows one size (see --scale).")]
Scale = Annotated[int | None, _help(help="Enlarge N times; 1 keeps the model's pixels [for viewing].")]
Resample = Annotated[str | None, _help(help="How to enlarge: lanczos, nearest [lanczos].")]
Device = Annotated[str | None, _help(help="auto, cpu, cuda, cuda:N [auto].")]
Dtype = Annotated[str | None, _help(help="auto, float32, bfloat16, float16 [auto].")]
Model = Annotated[str | None, _help("-m", "--model", help="The model [emoji].")]
Weights = Annotated[Path | None, _help(help="A weights file instead of the one in the package.")]
Source = Annotated[Path | None, _help("--from", help="Take everything from this PNG; flags override.")]
Show = Annotated[bool, _help("--preview/--no-preview", help="Show the pictures in the terminal.")]
Json = Annotated[bool, _help("--json", help="Print a JSON record on stdout.")]
Quiet = Annotated[bool, _help("-q", "--quiet", help="Print the file name only.")]


def generate(
    context: typer.Context,
    prompts: Prompts = None,
    n: Count = None,
    output: Output = None,
    steps: Steps = None,
    method: Method = None,
    guidance: Guidance = None,
    seed: Seed = None,
    schedule: Schedule = None,
    shift: Shift = None,
    style: Style = None,
    lora: Lora = None,
    few: Few = None,
    size: Size = None,
    scale: Scale = None,
    resample: Resample = None,
    device: Device = None,
    dtype: Dtype = None,
    model: Model = None,
    weights: Weights = None,
    source: Source = None,
    show: Show = True,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw pictures of the prompts: one picture, or a sheet of all."""
    others = ("output", "weights", "source", "show", "json", "quiet")
    request = settle({name: value for name, value in context.params.items() if name not in others}, source)
    target = output or _free_name(request)
    png.check_target(target)
    result, parameters = _draw(request, weights, quiet=quiet or json)
    page = _page(result, parameters)
    png.write_image(target, page, parameters)
    if json:
        print_json(_record(target, page, result, parameters))
        return
    depth = colour_depth() if show and not quiet else 0
    if depth:
        print(preview(result.images, depth))
    print(target)
    note(_summary(result), quiet=quiet)


def _draw(request: Request, weights: Path | None, *, quiet: bool) -> tuple["Result", dict[str, Any]]:
    """The pictures of `request` and the parameters to store with them; says on stderr what it does."""
    with progress_bar(quiet=quiet) as bar:
        task = bar.add_task("loading", total=None)
        show = lambda done, total: bar.update(task, description="sampling", completed=done, total=total)
        from rfkernels.pipeline import Pipeline

        pipe = Pipeline.load(request.model, device=_device(request), dtype=request.dtype, weights=weights)
        scale = request.scale or _viewing_scale(request, pipe.model.config.size)
        _check_sheet(request, pipe.model.config.size * scale)
        result = pipe(
            request.prompts,
            n=request.n,
            steps=request.steps,
            method=request.method,
            guidance=request.guidance,
            seed=request.seed,
            schedule=request.schedule,
            shift=request.shift,
            style=request.style,
            lora=request.lora,
            few=request.few,
            size=request.size,
            progress=show,
        )
    if request.weights not in (None, result.parameters["weights"]):
        note("warning: the earlier picture was made with other weights: this one will differ")
    changed = [
        name
        for name, digest in result.parameters["lora_files"].items()
        if request.lora_files.get(name, digest) != digest
    ]
    if changed:
        note(f"warning: the earlier picture was made with another {changed[0]}: this one will differ")
    for warning in result.warnings:
        note(f"warning: {warning}")
    return result, {**result.parameters, "scale": scale, "resample": request.resample}


def _device(request: Request) -> str:
    """The device asked for, else that of the earlier picture if it is here, else "auto"."""
    from rfkernels.pipeline import InputError, resolve_device

    if request.device != "auto" or request.made_on is None:
        return request.device
    try:
        return str(resolve_device(request.made_on))
    except InputError:
        note(f"warning: made on {request.made_on}, which is not here: this picture may differ")
        return "auto"


def _page(result: "Result", parameters: dict[str, Any]) -> Image.Image:
    """The picture alone with its transparency, or all pictures on a sheet."""
    images = [sheets.enlarge(image, parameters["scale"], parameters["resample"]) for image in result.images]
    if len(images) == 1:
        return images[0]
    prompts, n = parameters["prompts"], parameters["n"]
    labels = [prompt for prompt in prompts for _ in range(n)] if len(prompts) > 1 else None
    return sheets.sheet(images, labels, sheets.columns_for(len(images), n))


def _viewing_scale(request: Request, size: int) -> int:
    alone = len(request.prompts) * request.n == 1
    return max(1, (_SINGLE_SIDE if alone else _SHEET_SIDE) // size)


def _check_sheet(request: Request, side: int) -> None:
    count = len(request.prompts) * max(1, request.n)
    if count * side**2 > _MAX_PIXELS:
        raise UserError(f"{count} pictures of {side} pixels a side are too many: use a smaller -n or --scale")


def _free_name(request: Request) -> Path:
    """A file name of the first prompt and the seed that no file has yet."""
    words = re.sub(r"[^\w]+", "_", request.prompts[0].lower()).strip("_")[:40] or "picture"
    stem = f"{words}_{request.seed}"
    path, count = Path(f"{stem}.png"), 1
    while path.exists():
        count += 1
        path = Path(f"{stem}_{count}.png")
    return path


def _summary(result: "Result") -> str:
    count, seconds, used = len(result.images), result.seconds, result.parameters
    return (
        f"{count} picture{'s' * (count > 1)} in {seconds['total']:.2f} s "
        f"(loading {seconds['load']:.2f}, sampling {seconds['sample']:.2f}) "
        f"on {used['device']} in {used['dtype']}: {used['steps']} steps of {used['method']}, "
        f"guidance {used['guidance']:g}, seed {used['seed']}{_adapters(used)}"
    )


def _adapters(used: dict[str, Any]) -> str:
    """What the summary says of the adapters that were on."""
    named = [f"{Path(name).stem} {strength:g}" for name, strength in used["lora"].items()]
    named += ["the one for few steps"] * used["few"]
    return f", LoRA {', '.join(named)}" if named else ""


def _record(target: Path, page: Image.Image, result: "Result", parameters: dict[str, Any]) -> dict[str, Any]:
    drawn: Sequence[str] = [prompt for prompt in parameters["prompts"] for _ in range(parameters["n"])]
    return {
        "path": str(target),
        "width": page.width,
        "height": page.height,
        "pictures": [{"prompt": p, "seed": s} for p, s in zip(drawn, result.seeds, strict=True)],
        "parameters": parameters,
        "seconds": {name: round(value, 4) for name, value in result.seconds.items()},
        "warnings": list(result.warnings),
    }
