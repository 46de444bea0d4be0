import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from rfkernels.train import artwork, concepts, glyphs
from rfkernels.train.packages import PACKAGES, STYLES, Archive, DataError
from tests.train.archives import write_packages
from tests.train.banks import HELD_OUT, draw, make_bank

RING = artwork.SVG.format(
    left=0, top=0, width=32, height=32, body='<circle cx="16" cy="16" r="13" stroke="#f00" fill="none"/>'
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the small packages and the pack built from them."""
    pytest.importorskip("resvg_py")
    folder = tmp_path_factory.mktemp("emoji")
    write_packages(folder / "npm")
    glyphs.build(folder, size=32)
    return folder


@pytest.fixture(scope="module")
def bank(folder):
    return glyphs.load(folder / "emoji-32.pack")


def concept(bank, label):
    return bank.concepts[bank.concept_of(label)]


# ------------------------------------------------------------------------------------ concepts


def test_flags_letters_and_trademarks_are_no_concepts(bank):
    labels = [c.label for c in bank.concepts]
    assert labels == [
        "dog face", "dog", "red heart", "backhand index pointing right", "star", "red circle",
    ]  # fmt: skip


def test_names_are_everyday_words_and_no_other_label(bank):
    assert concept(bank, "dog face").names == ("dog", "puppy")  # as chosen
    assert concept(bank, "dog").names == ()  # "dog2" is no word
    assert concept(bank, "red heart").names == (
        "heart",
    )  # Unicode's "heavy black heart" is not what it shows
    assert concept(bank, "red circle").names == ("large red circle",)
    assert concept(bank, "backhand index pointing right").names == ("point right",)  # nor is it "white"


def test_tags_are_distinct_and_foreign_names_have_their_language(bank):
    assert concept(bank, "dog face").tags == ("pets",)  # "pet" is shared by four, "puppy" a name already
    assert concept(bank, "dog face").foreign == (("de", "hundegesicht"), ("de", "tier"), ("de", "hund"))
    assert concept(bank, "dog").foreign == (("de", "hund"), ("de", "tier"))
    assert concept(bank, "red circle").foreign == ()


def test_weights_groups_and_faces(bank):
    assert [c.weight for c in bank.concepts] == [4.0, 4.0, 4.0, 0.3, 4.0, 4.0]
    assert [c.face for c in bank.concepts] == [True, False, False, False, False, False]
    assert concept(bank, "star").group == "travel-places" and concept(bank, "star").subgroup == "sky-weather"
    assert concept(bank, "red heart").hexcode == "2764-fe0f"


def test_concept_lists_agree_with_each_other():
    assert not concepts.INCLUDED & concepts.EXCLUDED and not concepts.POPULAR & concepts.EXCLUDED
    assert not concepts.FACES & concepts.FACELESS
    lists = (concepts.INCLUDED, concepts.EXCLUDED, concepts.POPULAR, concepts.FACES, concepts.FACELESS)
    assert all(label == label.lower().strip() for labels in lists for label in labels)
    assert all(label == label.lower() for label in concepts.ALIASES)


# ------------------------------------------------------------------------------------ building


def test_every_style_shows_what_its_package_has(bank):
    shown = {(bank.concepts[g.concept].label, g.style) for g in bank.glyphs}
    svg = set(STYLES) - {"3d"}
    assert {s for label, s in shown if label == "red circle"} == set(STYLES) - {"fx"}
    assert {s for label, s in shown if label == "star"} == set(STYLES) - {"fx"}
    assert {s for label, s in shown if label == "dog"} == svg
    assert {s for label, s in shown if label == "dog face"} == {"fx"}
    assert {s for label, s in shown if label == "backhand index pointing right"} == svg - {"fx"}


def test_pictures_are_premultiplied_centred_and_turned_as_the_package_says(bank):
    images = bank.images
    assert images.shape == (len(bank.glyphs), 32, 32, 4) and (images[..., :3] <= images[..., 3:]).all()
    circle = images[bank.glyph_of(bank.concept_of("red circle"), "noto")]
    assert circle[16, 16].tolist() == [255, 0, 0, 255] and circle[0, 0].tolist() == [0, 0, 0, 0]
    hand = images[bank.glyph_of(bank.concept_of("backhand index pointing right"), "flat")]
    assert hand[16, 26, 3] == 255 and hand[16, 5, 3] == 0  # the bar on the left is mirrored
    heart = images[bank.glyph_of(bank.concept_of("red heart"), "noto")]  # 64 x 32, its disc in the left half
    assert heart[16, 8, 3] == 255 and heart[:8, :, 3].max() == 0 == heart[24:, :, 3].max()
    dark, light = (images[bank.glyph_of(bank.concept_of(c), "fx")][16, 16] for c in ("dog", "dog face"))
    assert dark[0] < light[0]  # fxemoji calls the face "dog" and the dog "dogside"


def test_build_is_deterministic_in_one_process_or_two(folder, tmp_path, monkeypatch):
    write_packages(tmp_path / "npm")
    monkeypatch.setattr(glyphs, "MANY", 1)
    assert glyphs.build(tmp_path, 32).read_bytes() == (folder / "emoji-32.pack").read_bytes()


def test_build_leaves_a_pack_that_is_there(folder, monkeypatch):
    monkeypatch.setattr(glyphs, "Archive", lambda *a: pytest.fail("an archive was read"))
    assert glyphs.build(folder, 32) == folder / "emoji-32.pack"


def test_sources_are_the_packages(bank):
    assert [s["name"] for s in bank.sources] == [p.name for p in PACKAGES]
    assert {s["licence"] for s in bank.sources} == {"Apache-2.0", "MIT"}


def test_one_glyph_in_twenty_is_held_out_but_no_popular_one_and_never_all_of_a_concept():
    pairs = [(f"thing {i}", s) for i in range(2000) for s in ("noto", "3d")] + [("pizza", s) for s in STYLES]
    parts = dict(zip(pairs, glyphs._splits(pairs), strict=True))
    assert 0.04 < sum(p == "held-out" for p in parts.values()) / len(pairs) < 0.06
    assert all(parts["pizza", s] == "train" for s in STYLES)
    assert all("train" in (parts[f"thing {i}", "noto"], parts[f"thing {i}", "3d"]) for i in range(2000))
    alone = glyphs._splits([(f"thing {i}", "noto") for i in range(2000)])
    assert set(alone) == {"train"}
    both = [p for p in pairs if all(zlib.crc32(f"{p[0]}|{s}".encode()) % 20 == 0 for s in ("noto", "3d"))]
    assert both  # so the rule for whole concepts was needed above


# ------------------------------------------------------------------------------------ drawing


def test_a_drawing_survives_its_webp():
    pytest.importorskip("resvg_py")
    webp, hue = artwork.draw(RING, 64)
    assert abs((hue + 180) % 360 - 180) < 3
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(noise).resize((8, 8), Image.Resampling.BOX).resize((128, 128)))
    for picture in (noise, smooth):
        out = io.BytesIO()
        Image.fromarray(picture).save(out, "PNG")
        webp, _ = artwork.draw(out.getvalue(), 64)
        read = np.asarray(Image.open(io.BytesIO(webp)).convert("RGBA").convert("RGBa"), float)
        exact = picture.reshape(64, 2, 64, 2, 3).mean((1, 3))
        error = ((read[..., :3] - exact) ** 2).mean()
        assert 10 * np.log10(255**2 / max(error, 1e-9)) > artwork.FAITHFUL - 1


def test_smooth_pictures_are_lossy_and_flat_ones_lossless():
    y, x = np.mgrid[:128, :128]
    waves = 128 + 90 * np.sin(np.stack([x + y, x - y, 2 * x], -1) / 23)
    out = io.BytesIO()
    Image.fromarray(waves.astype(np.uint8)).save(out, "PNG")
    assert artwork.draw(out.getvalue(), 64)[0][12:16] in (b"VP8 ", b"VP8X")
    out = io.BytesIO()
    Image.new("RGBA", (64, 64), (200, 10, 10, 255)).save(out, "PNG")
    assert artwork.draw(out.getvalue(), 64)[0][12:16] == b"VP8L"


@pytest.mark.parametrize("hue", [0, 50, 125, 212, 275, 359])
def test_dominant_hue_of_a_disc_with_grey_on_it(hue):
    colour = np.asarray(Image.new("HSV", (1, 1), (round(hue * 255 / 360), 220, 230)).convert("RGB"))[0, 0]
    image = draw("disc", tuple(int(c) for c in colour), 32)
    image[14:18, 14:18] = (90, 90, 90, 255)
    assert abs((artwork.dominant_hue(image) - hue + 180) % 360 - 180) < 3


def test_no_hue_leads_a_grey_a_clear_and_a_mostly_white_picture():
    assert artwork.dominant_hue(draw("disc", (120, 120, 122), 32)) is None
    assert artwork.dominant_hue(draw("disc", (30, 15, 45), 32)) is None  # nearly black
    assert artwork.dominant_hue(np.zeros((8, 8, 4), np.uint8)) is None
    image = draw("square", (255, 255, 255), 32)
    image[8:24, 8:11] = (220, 20, 20, 255)  # 48 of about 500 pixels
    assert artwork.dominant_hue(image) is None
    image[8:24, 8:20] = (220, 20, 20, 255)  # 192
    assert artwork.dominant_hue(image) is not None


# ------------------------------------------------------------------------------------ the pack


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: b"", r"was required, this file starts with b''"),
        (lambda raw: raw[:12], r"starts with b'RFKGLYPH'"),
        (lambda raw: b"PK\3\4" + raw, r"a pack of glyphs was required, this file starts with b'PK"),
        (lambda raw: raw[:-1], "truncated or damaged"),
        (lambda raw: raw[:400] + bytes([raw[400] ^ 1]) + raw[401:], "truncated or damaged"),
    ],
)
def test_other_and_damaged_files_are_refused(folder, tmp_path, damage, message):
    path = tmp_path / "x.pack"
    path.write_bytes(damage((folder / "emoji-32.pack").read_bytes()))
    with pytest.raises(DataError, match=message):
        glyphs.load(path)


def test_missing_file_and_other_format_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"none.pack: a pack of glyphs was required \(No such file"):
        glyphs.open_bank(tmp_path / "none.pack")
    text = zlib.compress(json.dumps({"format": 99}).encode())
    path = tmp_path / "new.pack"
    path.write_bytes(glyphs.MAGIC + struct.pack("<II", len(text), zlib.crc32(text)) + text)
    with pytest.raises(DataError, match="format 1 was expected, got 99; build it anew"):
        glyphs.load(path)


def test_smaller_sizes_are_area_means(folder, bank):
    small = glyphs.open_bank(folder / "emoji-32.pack", size=8)
    exact = bank.images.reshape(-1, 8, 4, 8, 4, 4).astype(np.float64).mean((2, 4))
    assert small.size == 8 and small.glyphs == bank.glyphs and small.concepts == bank.concepts
    assert np.abs(small.images - exact).max() <= 0.5 + 1e-3
    assert (glyphs.open_bank(folder / "emoji-32.pack", size=32).images == bank.images).all()
    for size in (0, 12, 64):
        with pytest.raises(ValueError, match=f"fraction of the pack's 32 pixels was required, got {size}"):
            glyphs.open_bank(folder / "emoji-32.pack", size=size)


def test_open_bank_builds_in_a_folder(folder):
    bank = glyphs.open_bank(folder, size=64)
    assert bank.size == 64 and (folder / "emoji-128.pack").exists()


def test_archives_are_read_by_name_of_the_package(folder):
    assert "icons.json" in Archive(folder / "npm", PACKAGES[0]).files


# ------------------------------------------------------------------------------------ a bank


def test_bank_finds_its_rows():
    bank = make_bank(16)
    pizza = bank.concept_of("pizza")
    assert bank.glyphs[bank.glyph_of(pizza, "flat")].concept == pizza and bank.glyph_of(pizza, "3d") is None
    held = [bank.glyphs[i] for i in bank.indices("held-out")]
    assert sorted((bank.concepts[g.concept].label, g.style) for g in held) == sorted(HELD_OUT)
    assert len(bank.indices("train")) + len(held) == len(bank.glyphs) and bank.size == 16
    with pytest.raises(ValueError, match=r"label of a concept was required.*got 'tomato'"):
        bank.concept_of("tomato")


def test_synthetic_hues_are_what_the_pictures_have():
    bank = make_bank(32)
    for image, glyph in zip(bank.images, bank.glyphs, strict=True):
        found = artwork.dominant_hue(image)
        assert (found is None) == (glyph.hue is None)
        assert found is None or abs((found - glyph.hue + 180) % 360 - 180) < 5
