import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from rfkernels.train import concepts, data
from tests.tiny import disc

CIRCLE = '<circle cx="16" cy="16" r="12" fill="{}"/>'


def archive(path, files: dict[str, bytes | dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))


def webp(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", (40, 40), (*colour, 255)).save(out, "WEBP", lossless=True)
    return out.getvalue()


@pytest.fixture
def packages(tmp_path):
    """A folder with small archives in the layout of the real packages: a red circle, a star, a flag."""
    emoji = [
        {"hexcode": "1F534", "label": "red circle", "tags": ["circle", "geometric"], "subgroup": 96},
        {"hexcode": "2B50", "label": "star", "tags": ["astronomy"], "subgroup": 59},
        {"hexcode": "1F3C1", "label": "chequered flag", "tags": [], "subgroup": 97},
    ]
    groups = {"subgroups": [{"order": 59, "key": "sky-weather"}, {"order": 96, "key": "geometric"}]}
    icons = {"red-circle": {"body": CIRCLE.format("#f00")}, "sky-star": {"body": CIRCLE.format("#ff0")}}
    iconify = {
        "prefix": "x",
        "icons": icons,
        "aliases": {"star": {"parent": "sky-star"}},
        "width": 32,
        "height": 32,
    }
    for package in data.PACKAGES:
        files: dict[str, bytes | dict] = {"package.json": {"license": package.licence}}
        if package.style is None:
            files |= {"en/data.json": emoji, "en/messages.json": groups}
        elif package.style == "3d":
            files |= {"assets/1f534.webp": webp((255, 0, 0)), "assets/2b50-fe0f.webp": webp((250, 220, 0))}
        else:
            chars = {"1f534": "red-circle", "2b50": "star"} if package.style != "blob" else {}
            files |= {"icons.json": iconify, "chars.json": chars}
            files["info.json"] = {"license": {"spdx": package.licence}}
        archive(tmp_path / "npm" / package.archive, files)
    return tmp_path


def test_build_renders_every_style_and_is_deterministic(packages):
    pytest.importorskip("resvg_py")
    path = data.build(packages, size=16)
    built = data.load(path)
    assert built.images.shape[1:] == (16, 16, 4) and len(built.images) == len(built.entries)
    plain = {(e.label, e.style) for e in built.entries if not e.tinted}
    assert plain == {(label, style) for label in ("red circle", "star") for style in data.STYLES}
    assert {e.label for e in built.entries if e.tinted} == {f"{c} star" for c in concepts.TINTS}
    assert {s["licence"] for s in built.sources} == {"Apache-2.0", "MIT"}
    first = built.images[next(i for i, e in enumerate(built.entries) if e.label == "red circle")]
    assert first[8, 8].tolist() == [255, 0, 0, 255] and first[0, 0].tolist() == [0, 0, 0, 0]
    content = path.read_bytes()
    path.unlink()
    again = data.load(data.build(packages, size=16))
    assert (again.images == built.images).all() and again.entries == built.entries
    assert data.build(packages, size=16).read_bytes()[:4] == content[:4]


def test_held_out_captions_are_in_no_training_row(packages):
    pytest.importorskip("resvg_py")
    built = data.open_data(packages, size=16)
    split = {e.label: e.split for e in built.entries}
    assert split["blue star"] == "held-out" and "blue star" in concepts.HELD_OUT
    assert split["red star"] == "train" and split["star"] == "train"  # popular, so never held out by chance


def test_other_licence_is_refused(packages):
    package = data.PACKAGES[0]
    archive(packages / "npm" / package.archive, {"package.json": {"license": "CC-BY-SA-4.0"}})
    with pytest.raises(data.DataError, match=r"Apache-2\.0 was expected.*CC-BY-SA"):
        data.build(packages, size=16)


def test_missing_npm_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "which", lambda name: None)
    with pytest.raises(data.DataError, match=r"npm is needed.*npm pack @iconify-json/noto@1.2.9"):
        data.fetch_packages(tmp_path)


def test_failing_npm_says_what_to_do(tmp_path, monkeypatch):
    done = data.subprocess.CompletedProcess([], 1, "", "npm error code E404\nnpm error not found\n")
    monkeypatch.setattr(data.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(data.subprocess, "run", lambda *a, **k: done)
    with pytest.raises(data.DataError, match=r"npm error not found.*npm pack"):
        data.fetch_packages(tmp_path / "npm")


def test_other_format_is_refused(tmp_path):
    path = tmp_path / "old.npz"
    meta = json.dumps({"format": 0, "entries": [], "sources": []})
    np.savez(path, images=np.zeros((0, 4, 4, 4), np.uint8), meta=np.array(meta))
    with pytest.raises(data.DataError, match="format 1 was expected, got 0; delete it"):
        data.load(path)


@pytest.mark.parametrize("colour", concepts.TINTS)
def test_tint_turns_the_main_colour_and_nothing_else(colour):
    image = disc((240, 200, 40))
    image[7:9, 7:9] = (90, 90, 90, 255)  # grey stays
    turned = data.tint(image, colour)
    assert (turned[..., 3] == image[..., 3]).all() and (turned[7, 7] == image[7, 7]).all()
    hue = np.asarray(Image.fromarray(turned[..., :3]).convert("HSV"))[8, 4, 0] * (360 / 255)
    assert abs((hue - concepts.TINTS[colour][0] + 180) % 360 - 180) < 4


def test_concept_lists_agree_with_each_other():
    assert not concepts.INCLUDED & concepts.EXCLUDED and not concepts.POPULAR & concepts.EXCLUDED
    assert all(caption.split()[0] in concepts.TINTS for caption in concepts.HELD_OUT)
    trained = set(concepts.TINTS) | {"green", "orange"}
    assert {c.split()[0] for c in concepts.HELD_OUT} <= trained
