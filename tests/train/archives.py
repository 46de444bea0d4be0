"""Small npm archives in the layout of the real emoji packages, for tests: nothing is downloaded."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from rfkernels.train.packages import PACKAGES

DISC = '<circle cx="16" cy="16" r="12" fill="{}"/>'
LEFT_BAR = '<rect x="2" y="2" width="6" height="28" fill="#0a0"/>'

EMOJI = [
    ("1F1E6", "regional indicator A", None, None, [], None),
    ("1F436", "dog face", 3, 34, ["puppy", "pet", "pets"], ["dog_face", "dog"]),
    ("1F415", "dog", 3, 34, ["dogs", "pet", "pets"], ["dog2"]),
    ("2764-FE0F", "red heart", 0, 14, ["love", "pet"], "heart"),
    ("1F449", "backhand index pointing right", 1, 18, ["finger", "pet"], "point_right"),
    ("2B50", "star", 5, 59, ["astronomy"], "star"),
    ("1F534", "red circle", 8, 96, ["circle"], "red_circle"),
    ("2122-FE0F", "trade mark", 8, 93, [], "tm"),
    ("1F3C1", "chequered flag", 9, 97, [], "chequered_flag"),
]
GERMAN = [
    ("1F436", "Hundegesicht", ["Tier", "hund", "wuff"]),
    ("1F415", "Hund", ["Tier"]),
    ("2B50", "Stern", []),
]
GROUPS = {0: "smileys-emotion", 1: "people-body", 3: "animals-nature", 5: "travel-places", 8: "symbols"}
SUBGROUPS = {
    14: "heart",
    18: "hand-single-finger",
    34: "animal-mammal",
    59: "sky-weather",
    93: "other",
}


def write_archive(path: Path, files: dict[str, bytes | dict | list]) -> None:
    """An npm archive with these files; what is not bytes is written as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))


def _webp(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", (40, 40), (*colour, 255)).save(out, "WEBP", lossless=True)
    return out.getvalue()


def _emojibase() -> dict:
    keys = ("hexcode", "label", "group", "subgroup", "tags")
    data = [{k: v for k, v in zip(keys, row[:5], strict=True) if v is not None} for row in EMOJI]
    groups = {**GROUPS, 9: "flags"}
    subgroups = {**SUBGROUPS, 96: "geometric", 97: "flag"}
    order = {
        "groups": [{"order": o, "key": k} for o, k in groups.items()],
        "subgroups": [{"order": o, "key": k} for o, k in subgroups.items()],
    }
    return {
        "en/data.json": data,
        "en/messages.json": order,
        "en/shortcodes/emojibase.json": {row[0]: row[5] for row in EMOJI if row[5]},
        "de/data.json": [{"hexcode": h, "label": n, "tags": t} for h, n, t in GERMAN],
    }


def _iconify(style: str) -> dict:
    icons = {
        "red-circle": {"body": DISC.format("#f00")},
        "sky-star": {"body": DISC.format("#ff0")},
        "dog": {"body": DISC.format("#a60")},
        "dogside": {"body": DISC.format("#630")},
        "left": {"body": LEFT_BAR},
        "redheart": {"body": DISC.format("#e01"), "width": 64},
        "tm": {"body": DISC.format("#000")},
        "chequered-flag": {"body": DISC.format("#000")},
    }
    aliases = {"star": {"parent": "sky-star"}, "point": {"parent": "left", "hFlip": True}}
    slugs = {"1f534": "red-circle", "2b50": "star", "1f449": "point", "2764": "redheart", "2122": "tm"}
    chars = slugs if style in ("noto", "flat") else {}
    return {
        "icons.json": {"icons": icons, "aliases": aliases, "width": 32, "height": 32},
        "chars.json": chars,
    }


def write_packages(folder: Path) -> None:
    """All of PACKAGES in `folder`, with a handful of emoji each; flags and trademarks are among them."""
    for package in PACKAGES:
        files: dict[str, bytes | dict | list] = {"package.json": {"license": package.licence}}
        if package.style is None:
            files |= _emojibase()
        elif package.style == "3d":
            files |= {"assets/1f534.webp": _webp((255, 0, 0)), "assets/2b50-fe0f.webp": _webp((250, 220, 0))}
        else:
            files |= _iconify(package.style) | {"info.json": {"license": {"spdx": package.licence}}}
        write_archive(folder / package.archive, files)
