"""A sheet of samples: what the model draws for fixed prompts, to look at while it trains."""

from pathlib import Path

from PIL import Image

from rfkernels.evaluation.draw import draw
from rfkernels.models.emoji import EmojiFlow, to_images

__all__ = ["PROMPTS", "contact_sheet", "write"]

PROMPTS = (
    "red heart noto",
    "green heart noto",
    "blue heart 3d",
    "orange circle flat",
    "purple square noto",
    "yellow star 3d",
    "blue star noto",
    "purple car flat",
    "grinning face noto",
    "face with tears of joy 3d",
    "smiling face with sunglasses flat",
    "cat face noto",
    "dog face 3d",
    "panda flat",
    "a fox",
    "unicorn noto",
    "tropical fish 3d",
    "butterfly blob",
    "pizza noto",
    "hamburger 3d",
    "red apple flat",
    "a birthday cake",
    "hot beverage noto",
    "a car",
    "rocket 3d",
    "house noto",
    "sunflower flat",
    "rose noto",
    "cactus 3d",
    "a snowman",
    "evergreen tree blob",
    "soccer ball noto",
    "guitar 3d",
    "crown noto",
    "ghost flat",
    "robot 3d",
    "red heart on a blue background",
    "cat face noto on a yellow background",
    "a pizza on a green background",
    "rocket 3d on a purple background",
)


def contact_sheet(images: list[Image.Image], columns: int, *, scale: int = 1) -> Image.Image:
    """One RGB picture of equally sized RGBA images on a light chequered ground."""
    size = images[0].width * scale
    rows = -(-len(images) // columns)
    sheet = Image.new("RGBA", (columns * size, rows * size), (255, 255, 255, 255))
    tile = Image.new("RGBA", (size, size), (255, 255, 255, 255))
    square = size // 8
    for y in range(8):
        for x in range(y % 2, 8, 2):
            tile.paste((236, 236, 236, 255), (x * square, y * square, (x + 1) * square, (y + 1) * square))
    for i, image in enumerate(images):
        at = (i % columns * size, i // columns * size)
        sheet.paste(tile, at)
        sheet.alpha_composite(image.resize((size, size), Image.Resampling.NEAREST), at)
    return sheet.convert("RGB")


def write(model: EmojiFlow, path: Path, prompts: tuple[str, ...] = PROMPTS, steps: int = 12) -> None:
    """Draws `prompts` with guidance 3 from fixed seeds and writes the sheet to `path`."""
    contact_sheet(to_images(draw(model, list(prompts), seed=7, steps=steps)), 8, scale=2).save(path)
