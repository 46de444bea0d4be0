"""`rfkernels mix`: what lies between two emoji, on one sheet."""

import secrets
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from rfkernels import png
from rfkernels.cli import sheet as sheets
from rfkernels.cli.console import UserError, note, print_json

__all__ = ["mix"]

_SIDE = 128  # pixels of a picture on the sheet
_MOST = 8  # prompts
_EDIT = {"steps": 24, "n_max": 20, "n_avg": 2, "shift": 2.0, "source": 1.5, "target": 5.0}  # of FlowEdit
_option = typer.Option


def mix(
    prompts: Annotated[list[str], typer.Argument(help="Two emoji or texts, or more: 🐱 🕶️")],
    output: Annotated[Path, _option("-o", "--output", help="File: .png, .webp, .jpg.")] = Path("mix.png"),
    between: Annotated[int, _option(help="Pictures between two prompts, 1 to 5.")] = 3,
    steps: Annotated[int | None, _option(help="Solver steps [the model's own].")] = None,
    guidance: Annotated[float | None, _option(help="Pull to the prompt [the model's own].")] = None,
    seed: Annotated[int, _option("-s", "--seed", help="One noise for all pictures; -1 is random.")] = -1,
    device: Annotated[str, _option(help="auto, cpu, cuda, cuda:N.")] = "auto",
    dtype: Annotated[str, _option(help="auto, float32, bfloat16, float16.")] = "auto",
    weights: Annotated[Path | None, _option(help="A weights file instead of the package's.")] = None,
    json: Annotated[bool, _option("--json", help="Print a JSON record on stdout.")] = False,
) -> None:
    """Draw each two neighbours: what lies between them, both together, the first edited to the second."""
    if not 2 <= len(prompts) <= _MOST:
        raise UserError(f"two to {_MOST} prompts are required, got {len(prompts)}: rfkernels mix 🐱 🕶️")
    if not 1 <= between <= 5:
        raise UserError(f"between must be from 1 to 5, got {between}")
    png.check_target(output)
    from rfkernels.pipeline import Pipeline

    pipe = Pipeline.load("emoji", device=device, dtype=dtype, weights=weights)
    seed = secrets.randbelow(2**32) if seed == -1 else seed
    options = {"steps": steps, "guidance": guidance, "seed": seed}
    images, labels, used = [], [], {}
    for a, b in pairwise(prompts):
        drawn, names, used = _row(pipe, a, b, between, options)
        images += drawn
        labels += names
    scale = max(1, _SIDE // pipe.model.config.size)
    page = sheets.sheet([sheets.enlarge(image, scale) for image in images], labels, between + 5)
    parameters = {**used, "prompts": list(prompts), "verb": "mix", "between": between, "scale": scale}
    png.write_image(output, page, parameters)
    if json:
        print_json({"path": str(output), "pictures": labels, "parameters": parameters})
        return
    print(output)
    note(f"{len(images)} pictures, seed {seed}")


def _row(pipe, a: str, b: str, between: int, options: dict[str, Any]):
    """Pictures, labels and parameters of a pair: a, those between, b, "a and b", "a with b", the edit."""
    from rfkernels.editing import mix as mixing
    from rfkernels.models.emoji import to_images
    from rfkernels.prompts import clean, spelled

    (a, b), _ = clean([a, b])
    spelt = spelled(a), spelled(b)
    whole = pipe([f"{a} and {b}", f"{a} with {b}"], **options)
    together = [pipe(prompt, **options).images[0] for prompt in whole.parameters["prompts"]]
    used = whole.parameters
    features = mixing.features_of(pipe.model, spelt)
    first, second = (_one(features, i) for i in (0, 1))
    shares = [k / (between + 1) for k in range(between + 2)]
    states = [_sampled(pipe, mixing.mixed(first, second, t), used) for t in shares]
    pictures = [to_images(x)[0] for x in states]
    edit = to_images(_edited(pipe, states[0].clamp(-1, 1), spelt, used["seed"]))[0]
    p, q = spelt
    names = [p, *(f"{100 * t:.0f} %" for t in shares[1:-1]), q, f"{p} and {q}", f"{p} with {q}"]
    return [*pictures, *together, edit], [*names, f"{p} edited to {q}"], used


def _one(features, index: int):
    """The features of one of the prompts."""
    row = slice(index, index + 1)
    return type(features)(features.words[row], features.pooled[row], features.mask[row])


def _sampled(pipe, features, used: dict[str, Any]):
    """The sample of the model for these features with the parameters of a call."""
    import torch

    from rfkernels import samplers
    from rfkernels.editing.mix import with_features
    from rfkernels.ops import noise_keys, philox_normal

    c = pipe.model.config
    tokens = pipe.model.grid**2 if used["schedule"] == "dynamic" else None
    sigmas = samplers.schedule(used["schedule"], used["steps"], shift=used["shift"], tokens=tokens)
    keys = noise_keys([used["seed"]], 1, device=pipe.device)
    noise = philox_normal((1, c.channels, c.size, c.size), keys)
    with torch.inference_mode():
        velocity = with_features(pipe.model, features)
        return samplers.sample(velocity, noise, sigmas, method=used["method"], guidance=used["guidance"])


def _edited(pipe, picture, prompts: tuple[str, str], seed: int):
    """The picture of the first prompt edited to the second by FlowEdit."""
    from rfkernels import samplers
    from rfkernels.editing import flow_edit

    model, e = pipe.model, _EDIT
    text = model.encode(["", "", *prompts])
    guided = model.config.guidance != 1
    plain = model.encode(list(prompts))
    velocity = (lambda z, s: model.guided(z, s, text)) if guided else (lambda z, s: model(z, s, plain))
    weights = (e["source"], e["target"]) if guided else (None, None)
    sigmas = samplers.schedule("shift", e["steps"], shift=e["shift"])
    return flow_edit(
        velocity, picture, sigmas, n_max=e["n_max"], n_avg=e["n_avg"], source_guidance=weights[0],
        target_guidance=weights[1], seeds=seed,
    )  # fmt: skip
