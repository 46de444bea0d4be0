"""A sheet of what `rfkernels.editing` does, with the embedded model: `python -m bench.editing_gallery`.

Every row is a method, every column a picture and the prompt that it is edited to.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rfkernels import editing
from rfkernels.editing import operators
from rfkernels.models.emoji import load_emoji, to_images
from rfkernels.ops import noise_keys, philox_normal
from rfkernels.samplers import sample, schedule

EDITS = (
    ("red heart", "blue heart"),
    ("blue circle", "green square"),
    ("cat face", "dog face"),
    ("grinning face", "crying face"),
    ("red car", "yellow taxi"),
    ("green apple", "red apple"),
)
STEPS = 24
LABEL, GAP, LINE = 160, 28, 13


class Gallery:
    """The pictures that are edited, and the velocities of their prompts."""

    def __init__(self, guidance: float = 3.0, seed: int = 1):
        self.model, self.guidance = load_emoji(), guidance
        self.size = self.model.config.size
        self.count = len(EDITS)
        self.texts = [self.model.encode([p[i] for p in EDITS]) for i in (0, 1)]
        self.empty = self.model.encode([""] * self.count)
        self.grid = schedule("shift", STEPS, shift=2.0)
        keys = noise_keys([seed + i for i in range(self.count)], self.count)
        self.noise = philox_normal((self.count, 4, self.size, self.size), keys)
        self.other = philox_normal(self.noise.shape, noise_keys(seed + 90, self.count))
        self.source = sample(self.guided(0), self.noise, self.grid, method="ab2", guidance=guidance).clamp(
            -1, 1
        )

    def guided(self, which: int):
        """(uncond, cond) of the source prompts (0) or the target prompts (1)."""
        prompts = [p[which] for p in EDITS]
        text = self.model.encode([""] * self.count + prompts)
        return lambda x, sigma: self.model.guided(x, sigma, text)

    def plain(self, text):
        return lambda x, sigma: self.model(x, sigma, text)

    def both(self):
        """Of sources and targets side by side, for FlowEdit: (uncond, cond)."""
        prompts = [p[0] for p in EDITS] + [p[1] for p in EDITS]
        text = self.model.encode([""] * len(prompts) + prompts)
        return lambda z, sigma: self.model.guided(z, sigma, text)

    # --- rows ---

    def target(self) -> Tensor:
        return sample(self.guided(1), self.noise, self.grid, method="ab2", guidance=self.guidance)

    def reconstruction(self, method: str) -> Tensor:
        velocity, grid = self.plain(self.texts[0]), schedule("shift", STEPS // 2, shift=2.0)
        noise = editing.invert(velocity, self.source, grid, method=method)
        return sample(velocity, noise, grid, method=method)

    def rf_inversion(self) -> Tensor:
        noise = editing.rf_inversion(
            self.plain(self.empty), self.source, self.grid.flip(0), gamma=0.5, noise=self.other
        )
        return editing.rf_inversion_edit(
            self.guided(1), noise, self.grid, target=self.source, eta=0.7, stop=STEPS // 5, guidance=4.0
        )

    def rf_edit(self) -> Tensor:
        grid, half = schedule("shift", STEPS // 2, shift=2.0), STEPS // 2
        count = len(self.model.single_blocks)
        last = {f"single_blocks.{k}" for k in range(count // 2, count)}
        late, tokens = lambda i, name: name in last, slice(0, self.model.grid**2)
        with editing.ValueSharing(self.model, late, inject=1, picture=tokens) as sharing:
            store = sharing.storing(self.plain(self.texts[0]), half, 2)
            noise = editing.invert(store, self.source, grid)
            edit = sharing.injecting(self.guided(1), half, 2)
            return sample(edit, noise, grid, method="rf-solver", guidance=5.0)

    def flow_edit(self) -> Tensor:
        return editing.flow_edit(
            self.both(), self.source, self.grid, n_max=STEPS - 4, n_avg=2, source_guidance=1.5,
            target_guidance=5.0, seeds=3,
        )  # fmt: skip

    def image_to_image(self) -> Tensor:
        return editing.image_to_image(
            self.guided(1), self.source, self.grid, strength=0.8, guidance=self.guidance, seeds=5
        )

    def masked(self) -> tuple[Tensor, Tensor]:
        """A box in the lower right is not known; it is grey in the row above."""
        n, edge = self.size, 28 * self.size // 64
        mask = operators.box(n, n, edge, edge, n, n).float()
        return mask * self.source, mask

    def inpaint(self) -> Tensor:
        known, mask = self.masked()
        return editing.inpaint(
            self.guided(0), self.other, self.grid, known=known, mask=mask, travel=editing.Travel(3, 2),
            guidance=self.guidance, seeds=7,
        )  # fmt: skip

    def chef(self, steer) -> Tensor:
        return editing.flow_chef(self.guided(0), self.other, self.grid, steer, guidance=self.guidance)

    def chef_inpaint(self) -> Tensor:
        known, mask = self.masked()
        return self.chef(editing.Keep(known, mask, pull=0.5, inner=2))

    def small(self) -> tuple[Tensor, Tensor]:
        rows = operators.pooling(self.size, 4)
        return operators.measure(self.source, rows, rows), rows

    def chef_enlarge(self) -> Tensor:
        y, rows = self.small()
        return self.chef(editing.Separable(y, rows, rows))

    def blurred(self) -> tuple[Tensor, Tensor]:
        rows = operators.gaussian_blur(self.size, 14 * self.size // 64, 3.0 * self.size / 64)
        return operators.measure(self.source, rows, rows), rows

    def chef_deblur(self) -> Tensor:
        y, rows = self.blurred()
        return self.chef(editing.Separable(y, rows, rows, inner=20))

    def rows(self) -> list[tuple[str, Callable[[], Tensor]]]:
        enlarged = lambda: self.small()[0].repeat_interleave(4, -1).repeat_interleave(4, -2)
        return [
            ("source", lambda: self.source),
            ("target prompt, same noise", self.target),
            ("Euler there and back", lambda: self.reconstruction("euler")),
            ("RF-Solver there and back", lambda: self.reconstruction("rf-solver")),
            ("RF-Inversion", self.rf_inversion),
            ("RF-Edit", self.rf_edit),
            ("FlowEdit", self.flow_edit),
            ("image to image", self.image_to_image),
            ("known part", lambda: self.masked()[0]),
            ("inpaint", self.inpaint),
            ("FlowChef inpainting", self.chef_inpaint),
            ("1/4 size", enlarged),
            ("FlowChef enlarging", self.chef_enlarge),
            ("blurred", lambda: self.blurred()[0]),
            ("FlowChef deblurring", self.chef_deblur),
        ]


@torch.no_grad()
def sheet(gallery: Gallery) -> Image.Image:
    """All rows, on white, labelled."""
    rows = gallery.rows()
    size = gallery.size
    top, cell = 2 * LINE + 8, size + GAP
    page = Image.new("RGB", (LABEL + len(EDITS) * cell, top + len(rows) * (size + 6)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for j, pair in enumerate(EDITS):
        for line, text in enumerate((pair[0], f"to {pair[1]}")):
            draw.text((LABEL + j * cell, 2 + LINE * line), text, "black", font)
    for i, (name, make) in enumerate(rows):
        x = make()
        if not bool(x.isfinite().all()):
            raise ValueError(f"{name}: values that are not finite")
        y = top + i * (size + 6)
        draw.text((4, y + size // 2 - 8), name, "black", font)
        for j, image in enumerate(to_images(x)):
            page.paste(image, (LABEL + j * cell, y), image)
        error = (x - gallery.source).square().mean().item()
        print(f"{name:28} mean square difference from the source {error:.4f}")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/editing.png"))
    out = parser.parse_args().out
    page = sheet(Gallery()).quantize(255, dither=Image.Dither.NONE)
    page.save(out, optimize=True)
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
