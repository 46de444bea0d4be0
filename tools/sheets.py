"""The sheets of docs: what adapters do, and what steps do, on fixed prompts and one seed.

python tools/sheets.py [--out docs]
"""

import argparse
from pathlib import Path

from rfkernels import png
from rfkernels.cli.sheet import sheet
from rfkernels.pipeline import Pipeline

PROMPTS = (
    "a red heart",
    "grinning face",
    "a cat face",
    "a panda",
    "a purple apple",
    "a robot on a blue background",
)
STYLES = ({}, {"pixel": 1.0}, {"outline": 1.0}, {"glow": 1.0}, {"pixel": 0.7, "glow": 0.7})
STEPS = (1, 2, 4, 12, 25)
SEED = 11


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs"))
    out = parser.parse_args().out
    pipe = Pipeline.load("emoji")
    styles = [(" + ".join(lora) or "none", {"lora": lora}) for lora in STYLES]
    steps = [(f"{n} step{'s' * (n > 1)}", {"steps": n}) for n in STEPS]
    for name, rows in (("loras.png", styles), ("steps.png", steps)):
        results = [(label, pipe(PROMPTS, seed=SEED, **options)) for label, options in rows]
        images = [image for _, result in results for image in result.images]
        labels = [label for label, result in results for _ in result.images]
        png.write_image(
            out / name, sheet(images, labels, len(PROMPTS)), {"seed": SEED, "prompts": list(PROMPTS)}
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
