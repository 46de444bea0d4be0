"""Pictures on disk: the parameters come back, a file appears whole or not at all."""

import json
import os

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rfkernels import png

PARAMETERS = {
    "version": "0.1.0",
    "model": "emoji",
    "weights": "sha256:0123456789abcdef",
    "prompts": ["a red heart"],
    "n": 1,
    "steps": 8,
    "method": "ab2",
    "guidance": 3.0,
    "seed": 7,
    "schedule": "linear",
    "shift": None,
    "style": None,
    "size": 64,
}


@pytest.fixture
def image() -> Image.Image:
    image = Image.new("RGBA", (5, 3), (10, 200, 30, 128))
    image.putpixel((1, 1), (255, 0, 0, 0))
    return image


def test_png_gives_back_pixels_and_parameters(tmp_path, image):
    path = tmp_path / "a.png"
    png.write_image(path, image, PARAMETERS)
    assert png.read_parameters(path) == PARAMETERS
    with Image.open(path) as again:
        assert again.mode == "RGBA" and again.tobytes() == image.tobytes()
    assert os.listdir(tmp_path) == ["a.png"]


def test_parameters_text_is_the_line_format_of_other_tools(tmp_path, image):
    path = tmp_path / "a.png"
    png.write_image(path, image, PARAMETERS)
    assert png.read_text(path)["parameters"] == (
        "a red heart\nSteps: 8, Sampler: ab2, Schedule type: linear, CFG scale: 3, Seed: 7, Size: 64x64, "
        "Model hash: 0123456789, Model: emoji, Version: rfkernels 0.1.0"
    )


@pytest.mark.parametrize(
    "prompt", ["", "赤いハート ❤", "сердце", "line\nline", 'quote " and \\ and {}', "\0", "x" * 10_000]
)
def test_any_prompt_survives(tmp_path, image, prompt):
    path = tmp_path / "a.png"
    png.write_image(path, image, {**PARAMETERS, "prompts": [prompt]})
    assert png.read_parameters(path)["prompts"] == [prompt]


def test_webp_is_lossless_and_jpeg_lies_on_white(tmp_path, image):
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    png.write_image(tmp_path / "a.webp", image, PARAMETERS)
    png.write_image(tmp_path / "a.jpg", clear, PARAMETERS)
    with Image.open(tmp_path / "a.webp") as again:
        assert again.getpixel((0, 0)) == image.getpixel((0, 0))
    with Image.open(tmp_path / "a.jpg") as again:
        assert again.getpixel((8, 8)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out", "no known image extension"),
        ("out.gif", "no known image extension"),
        ("missing/out.png", "does not exist"),
        (".", "is a folder"),
        ("x" * 300 + ".png", "cannot write"),
    ],
)
def test_refuses_targets_before_anything_is_written(tmp_path, name, message):
    with pytest.raises(png.PngError, match=message) as caught:
        png.check_target(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_refuses_a_write_protected_file_or_folder(tmp_path, monkeypatch, image):
    target = tmp_path / "a.png"
    png.write_image(target, image, PARAMETERS)
    before = target.read_bytes()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(png.PngError, match="write-protected"):
        png.write_image(target, image, PARAMETERS)
    assert target.read_bytes() == before


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, image):
    target = tmp_path / "a.png"
    png.write_image(target, image, PARAMETERS)
    before = target.read_bytes()

    def full(self, file, kind, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(png.PngError, match="No space left on device"):
        png.write_image(target, image, PARAMETERS)
    assert target.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch, image):
    def interrupted(self, file, kind, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        png.write_image(tmp_path / "a.png", image, PARAMETERS)
    assert os.listdir(tmp_path) == []


def write_text(path, key: str, value: str) -> None:
    info = PngInfo()
    info.add_text(key, value)
    Image.new("RGB", (2, 2)).save(path, pnginfo=info)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("parameters", "a cat\nSteps: 20", "carries no rfkernels parameters"),
        ("rfkernels", "{", "damaged"),
        ("rfkernels", "[" * 100_000, "damaged"),
        ("rfkernels", json.dumps([1]), "damaged"),
    ],
)
def test_refuses_pictures_without_usable_parameters(tmp_path, key, value, message):
    path = tmp_path / "a.png"
    write_text(path, key, value)
    with pytest.raises(png.PngError, match=message):
        png.read_parameters(path)


def test_refuses_what_is_no_png(tmp_path, image):
    text, jpeg, cut = tmp_path / "a.txt", tmp_path / "a.jpg", tmp_path / "cut.png"
    text.write_text("hello")
    image.convert("RGB").save(jpeg)
    png.write_image(cut, Image.effect_noise((64, 64), 50), PARAMETERS)
    cut.write_bytes(cut.read_bytes()[:-200])
    for path, message in [
        (text, "not a PNG"),
        (jpeg, "not a PNG"),
        (cut, "cannot read"),
        (tmp_path / "no", "exist"),
    ]:
        with pytest.raises(png.PngError, match=message) as caught:
            png.read_parameters(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(png.PngError, match="cannot read"):
        png.read_parameters(tmp_path)
