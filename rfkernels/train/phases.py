"""The phases of making the embedded model, each by one call: flow, reflow, distil, lora."""

from pathlib import Path

__all__ = ["PHASES", "STYLES", "run_phase"]

PHASES = ("flow", "reflow", "distil", "lora")
STYLES = ("pixel", "outline", "glow")
_SHARE_OF_PAIRS = 0.45  # of the first leg of reflow and distil, where pairs have to be made


def run_phase(
    phase: str,
    out: Path,
    *,
    preset: str = "small",
    minutes: float | None = None,
    leg: float | None = None,
    steps: int | None = None,
    batch: int | None = None,
    seed: int = 0,
    data: Path | None = None,
    start: Path | None = None,
    pairs: Path | None = None,
    count: int = 50_000,
    style: str = "pixel",
    rank: int = 0,
    resume: bool = False,
    device: str = "cpu",
    compile: bool = True,
    workers: int = 0,
) -> Path:
    """Runs a phase or a leg of it; returns its weights, or its adapter, beside the checkpoint `out/last.pt`.

    Args:
        preset: the shape of the model and its recipe, for flow.
        minutes, steps, batch: of the whole run; None: those of the recipe.
        leg: minutes of this part; `resume` goes on.
        data: the `.pack` file of glyphs or the folder where it is made.
        start: weights to start from and to teach; None: random numbers for flow, else the package's own.
        pairs: a folder of noises and the teacher's pictures, for reflow and distil; `count` are made first if
            it holds fewer, in at most 45 % of the leg.
        style: of an adapter. rank: above 0 distil trains an adapter of that rank.

    Raises:
        ValueError: an unknown phase, preset or style, or what the phase itself refuses.
        DataError, WeightsError, FileNotFoundError: as in the phase itself.
    """
    options = {"leg": leg, "start": start, "resume": resume, "device": device, "compile": compile}
    options |= {"minutes": minutes, "workers": workers}
    if phase == "flow":
        from rfkernels.train import emoji

        changes = {"steps": steps, "batch": batch, "seed": seed}
        given = {name: value for name, value in changes.items() if value is not None}
        checkpoint = emoji.train(out, data=data, preset=preset, **options, **given)
        return emoji.export(checkpoint, Path(out) / "emoji.safetensors")
    options |= {"steps": steps, "seed": seed}
    if phase == "lora":
        from rfkernels.train import lora
        from rfkernels.train.glyphs import open_bank

        options["recipe"] = _with_batch(lora.RECIPE, batch)
        return lora.train(out, style, bank=open_bank(data), **options)
    if phase not in PHASES:
        raise ValueError(f"unknown phase {phase!r}: use one of {', '.join(PHASES)}")
    from rfkernels.train import distil, reflow

    module = reflow if phase == "reflow" else distil
    options["recipe"] = _with_batch(module.RECIPE, batch)
    folder = Path(pairs or Path(out) / "pairs")
    options["leg"] = _make_pairs(folder, count, start, data, seed, device, leg)
    if phase == "distil":
        options["rank"] = rank
    return module.train(out, folder, **options)


def _with_batch(recipe, batch: int | None):
    from dataclasses import replace

    return recipe if batch is None else replace(recipe, batch=batch)


def _make_pairs(folder: Path, count, start, data, seed, device, leg: float | None) -> float | None:
    """Makes the pairs that are missing; returns what is left of the leg."""
    import time

    from rfkernels.train.glyphs import open_bank
    from rfkernels.train.pairs import make_pairs

    begun = time.monotonic()
    limit = float("inf") if leg is None else _SHARE_OF_PAIRS * leg
    bank = open_bank(data)
    make_pairs(folder, count, weights=start, bank=bank, seed=seed, device=device, minutes=limit)
    return None if leg is None else max(leg - (time.monotonic() - begun) / 60, 0.01)
