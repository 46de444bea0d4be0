"""`rfkernels generate` and `show`: files, streams, exit codes, and the way back from a picture."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from rfkernels import png, samplers
from tests.cli.conftest import one_line


def test_one_picture_keeps_its_transparency_and_is_enlarged_for_viewing(run, weights):
    ran = run("generate", "red heart", "--weights", weights, "--steps", 2, "--seed", 4)
    assert ran.code == 0 and ran.out == "red_heart_4.png\n"
    assert "2 steps of ab2, guidance 3, seed 4" in ran.err and "1 picture in" in ran.err
    with Image.open("red_heart_4.png") as image:
        assert image.mode == "RGBA" and image.size == (256, 256)
    assert os.listdir(".") == ["red_heart_4.png"]


def test_scale_one_keeps_the_pixels_of_the_model(run, weights):
    run("generate", "red heart", "--weights", weights, "--seed", 4, "--scale", 1, "-o", "small.png")
    run(
        "generate",
        "red heart",
        "--weights",
        weights,
        "--seed",
        4,
        "--scale",
        3,
        "--resample",
        "nearest",
        "-o",
        "n.png",
    )
    with Image.open("small.png") as small, Image.open("n.png") as large:
        assert small.size == (16, 16) and large.size == (48, 48)
        assert large.resize((16, 16), Image.Resampling.NEAREST).tobytes() == small.tobytes()


def test_sheets_are_large_enough_for_all_pictures(run, weights):
    run("generate", "red heart", "-n", 5, "--weights", weights, "--steps", 1, "-o", "a.png")
    run("generate", "red heart", "heart", "-n", 3, "--weights", weights, "--steps", 1, "-o", "b.png")
    with Image.open("a.png") as plain, Image.open("b.png") as labelled:
        assert plain.mode == "RGB" and plain.size == (3 * 140 + 12, 2 * 140 + 12)
        assert labelled.width == 3 * 140 + 12 and labelled.height > 2 * 140 + 12


def test_default_names_never_overwrite(run, weights):
    names = [
        run("generate", "a/b!", "--weights", weights, "--seed", 1, "--steps", 1).out.strip() for _ in range(3)
    ]
    assert names == ["a_b_1.png", "a_b_1_2.png", "a_b_1_3.png"]


def test_json_is_alone_on_stdout(run, weights):
    ran = run(
        "generate",
        "red heart",
        "-n",
        2,
        "--weights",
        weights,
        "--steps",
        1,
        "--json",
        "-o",
        "a.png",
        "--seed",
        3,
    )
    record = json.loads(ran.out)
    assert ran.err == "" and record["path"] == "a.png" and record["warnings"] == []
    assert record["pictures"] == [{"prompt": "red heart", "seed": 3}, {"prompt": "red heart", "seed": 4}]
    assert set(record["seconds"]) == {"load", "sample", "total"}
    assert record["parameters"] == png.read_parameters("a.png")


def test_quiet_prints_the_name_only(run, weights):
    ran = run("generate", "red heart", "--weights", weights, "--steps", 1, "-q", "-o", "a.png")
    assert (ran.code, ran.out, ran.err) == (0, "a.png\n", "")


def test_a_random_seed_is_printed_and_stored(run, weights):
    ran = run("generate", "red heart", "--weights", weights, "--steps", 1, "-o", "a.png")
    seed = png.read_parameters("a.png")["seed"]
    assert seed >= 0 and f"seed {seed}" in ran.err


def test_from_makes_the_same_file_again(run, weights):
    flags = [
        "-n",
        2,
        "--steps",
        3,
        "--method",
        "heun",
        "--guidance",
        2,
        "--schedule",
        "shift",
        "--shift",
        2.5,
    ]
    run(
        "generate",
        "red heart",
        "heart",
        *flags,
        "--style",
        "flat",
        "--weights",
        weights,
        "-o",
        "a.png",
        "--seed",
        9,
    )
    ran = run("generate", "--from", "a.png", "--weights", weights, "-o", "b.png")
    assert ran.code == 0 and Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_flags_override_what_a_picture_stores(run, weights):
    run("generate", "red heart", "--weights", weights, "--steps", 1, "--seed", 2, "-o", "a.png")
    run("generate", "heart", "--from", "a.png", "--weights", weights, "--steps", 2, "-o", "b.png")
    first, second = png.read_parameters("a.png"), png.read_parameters("b.png")
    assert second == {**first, "prompts": ["heart"], "steps": 2}


def test_a_shift_alone_chooses_its_schedule(run, weights):
    run("generate", "red heart", "--weights", weights, "--steps", 1, "--shift", 2, "-o", "a.png")
    run("generate", "--from", "a.png", "--schedule", "linear", "--weights", weights, "-o", "b.png")
    stored = [png.read_parameters(name) for name in ("a.png", "b.png")]
    assert [(used["schedule"], used["shift"]) for used in stored] == [("shift", 2.0), ("linear", None)]


def test_from_warns_of_other_weights_and_of_a_device_that_is_not_here(run, weights):
    run("generate", "red heart", "--weights", weights, "--steps", 1, "-o", "a.png")
    with Image.open("a.png") as image:
        stored = {**png.read_parameters("a.png"), "weights": "sha256:0", "device": "cuda:77"}
        png.write_image("b.png", image, stored)
    ran = run("generate", "--from", "b.png", "--weights", weights, "-o", "c.png")
    assert ran.code == 0 and "other weights" in ran.err and "cuda:77, which is not here" in ran.err
    ran = run("generate", "--from", "b.png", "--weights", weights, "--device", "cuda:77", "-o", "d.png")
    assert one_line(ran, ["cuda:77", "use cpu or auto"])


def test_unknown_words_and_empty_prompts_warn(run, weights):
    ran = run("generate", "red zorblax", "", "--weights", weights, "--steps", 1, "-o", "a.png")
    assert ran.code == 0 and "zorblax" in ran.err and "unconditional" in ran.err
    assert all(line.startswith("warning: ") for line in ran.err.splitlines()[:-1])


def test_awkward_prompts_work(run, weights):
    for prompt in ("x" * 10_000, "赤いハート ❤", "قلب أحمر", "../../etc", "\udcff"):
        ran = run("generate", prompt, "--weights", weights, "--steps", 1)
        assert ran.code == 0 and len(ran.out.strip()) < 100
    assert len(os.listdir(".")) == 5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["no prompt", "rfkernels generate"]),
        (["a", "--steps", "0"], ["steps", "1 to 1000", "got 0"]),
        (["a", "--steps", "-5"], ["got -5"]),
        (["a", "--steps", "99999999"], ["got 99999999"]),
        (["a", "--steps", "many"], ["--steps"]),
        (["a", "--method", "dpm"], ["unknown method 'dpm'", "euler", "ab2"]),
        (["a", "--size", "512"], ["does not know size 512", "use 16", "--scale"]),
        (["a", "--style", "oil"], ["unknown style", "noto"]),
        (["a", "--schedule", "kl"], ["unknown schedule", "linear"]),
        (["a", "--resample", "cubic"], ["unknown resampling", "lanczos, nearest"]),
        (["a", "--scale", "0"], ["scale must be from 1 to 64"]),
        (["a", "-n", "300", "--scale", "64"], ["too many", "--scale"]),
        (["a", "-n", "0"], ["n must be", "got 0"]),
        (["a", "-n", "-1"], ["n must be", "got -1"]),
        (["a", "--guidance", "nan"], ["guidance", "finite"]),
        (["a", "--seed", "-7"], ["seed", "-1: random"]),
        (["a", "--device", "tpu"], ["unknown device 'tpu'", "cpu"]),
        (["a", "--device", "cuda:99"], ["cuda:99", "use cpu or auto"]),
        (["a", "--dtype", "int3"], ["unknown dtype 'int3'", "bfloat16"]),
        (["a", "--model", "flux"], ["unknown model 'flux'", "emoji"]),
        (["a", "--from", "missing.png"], ["missing.png", "does not exist"]),
        (["a", "-o", "out.gif"], ["no known image extension", ".png"]),
        (["a", "-o", "missing/out.png"], ["missing", "does not exist"]),
        (["a", "-o", "."], ["is a folder"]),
        (["a", "--colour", "red"], ["--colour"]),
        (["a", "--lora", "oil"], ["unknown LoRA 'oil'", "or a file"]),
        (["a", "--lora", "oil:much"], ["NAME:STRENGTH", "oil:much"]),
        (["a", "--lora", "oil:99"], ["from -10 to 10", "99"]),
        (["a", "--few"], ["no adapter for few steps"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run, weights, words, expected):
    ran = run("generate", *words, "--weights", weights)
    assert one_line(ran, expected), ran
    assert os.listdir(".") == []


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all", b"\x08\0\0\0\0\0\0\0{}      "])
def test_bad_weights_are_one_line(run, tmp_path, content):
    path = tmp_path / "w.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert one_line(run("generate", "a", "--weights", path, "-q"), ["w.safetensors"])


def test_truncated_weights_are_one_line(run, weights, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:-1000])
    assert one_line(run("generate", "a", "--weights", "cut.safetensors", "-q"), ["cut.safetensors"])


def test_outputs_are_refused_before_the_model_is_loaded(run):
    assert one_line(run("generate", "a", "-o", "no/out.png", "--weights", "no.safetensors"), ["folder no"])


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"prompts": "text"}, "damaged (prompts"),
        ({"prompts": ["a"], "steps": "8"}, "damaged (steps"),
        ({"prompts": ["a"], "seed": True}, "damaged (seed"),
        ({"prompts": ["a"], "guidance": "3"}, "damaged (guidance"),
        ({"prompts": ["a"], "lora": {"pixel": "1"}}, "damaged (lora"),
        ({"prompts": ["a"], "few": 1}, "damaged (few"),
        ({"prompts": ["a"], "steps": 10**30}, "steps must be"),
        ({"prompts": ["a"], "n": 10**9}, "too many"),
        ({"steps": 8}, "no prompt"),
    ],
)
def test_damaged_parameters_are_one_line(run, weights, stored, expected):
    png.write_image("a.png", Image.new("RGB", (4, 4)), stored)
    assert one_line(run("generate", "--from", "a.png", "--weights", weights, "-q"), [expected])


def test_show_prints_what_generate_stored(run, weights):
    run("generate", "red heart", "--weights", weights, "--steps", 2, "--seed", 1, "-o", "a.png")
    ran = run("show", "a.png")
    assert ran.code == 0 and ran.out.startswith("red heart\nSteps: 2, Sampler: ab2") and "\x1b" not in ran.out
    assert "rfkernels generate --from a.png" in ran.err
    ran = run("show", "a.png", "--json")
    assert json.loads(ran.out) == png.read_parameters("a.png") and ran.err == ""


def test_show_refuses_pictures_without_parameters(run):
    Image.new("RGB", (4, 4)).save("plain.png")
    Image.new("RGB", (4, 4)).save("plain.jpg")
    assert one_line(run("show", "plain.png"), ["carries no parameters"])
    assert one_line(run("show", "plain.png", "--json"), ["carries no rfkernels parameters"])
    assert one_line(run("show", "plain.jpg"), ["not a PNG"])
    assert one_line(run("show", "absent.png"), ["does not exist"])


def test_show_keeps_control_characters_from_the_terminal(run):
    png.write_image("a.png", Image.new("RGB", (4, 4)), {"prompts": ["a \x1b]0;owned\x07 b"], "steps": 1})
    ran = run("show", "a.png")
    assert ran.code == 0 and ran.out.startswith("a  ]0;owned  b\nSteps: 1")


def test_an_interrupt_leaves_nothing_and_exits_130(run, weights, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(samplers, "sample", interrupted)
    ran = run("generate", "red heart", "--weights", weights, "-o", "a.png")
    assert (ran.code, ran.out, ran.err) == (130, "", "rfkernels: interrupted\n")
    assert os.listdir(".") == []


def test_a_result_that_is_not_finite_is_an_error_not_a_picture(run, weights, monkeypatch):
    monkeypatch.setattr(samplers, "sample", lambda velocity, x, sigmas, **options: x * float("nan"))
    ran = run("generate", "red heart", "--weights", weights, "-o", "a.png")
    assert ran.code == 1 and ran.out == "" and "not finite: use float32" in ran.err
    assert os.listdir(".") == []


@pytest.fixture
def adapters(weights, tmp_path_factory, monkeypatch):
    """A package with the LoRA "pixel"."""
    from safetensors.torch import save_file

    from rfkernels import loras

    folder = tmp_path_factory.mktemp("adapters")
    factors = {"A": torch.full((1, 64), 0.1), "B": torch.ones(64, 1)}
    save_file({f"text.out.lora_{k}.weight": t for k, t in factors.items()}, folder / "lora-pixel.safetensors")
    monkeypatch.setattr(loras, "FOLDER", folder)
    monkeypatch.setattr(loras, "FEW", folder / "emoji-few.safetensors")
    return folder


def test_loras_are_named_stored_and_made_again(run, weights, adapters):
    flags = ["--weights", weights, "--steps", 2, "--seed", 3]
    assert ", LoRA pixel 0.5" in run("generate", "❤️", *flags, "--lora", "pixel:0.5", "-o", "a.png").err
    assert png.read_parameters("a.png")["lora"] == {"pixel": 0.5}
    assert "LoRA: pixel:0.5" in run("show", "a.png").out
    run("generate", "--from", "a.png", "--weights", weights, "-o", "b.png")
    assert png.read_parameters("a.png") == png.read_parameters("b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    run("generate", "❤️", *flags, "-o", "c.png")
    with Image.open("a.png") as with_lora, Image.open("c.png") as without:
        assert with_lora.tobytes() != without.tobytes()
    with Image.open("a.png") as image:
        stored = {**png.read_parameters("a.png"), "lora_files": {"pixel": "sha256:0"}}
        png.write_image("d.png", image, stored)
    assert "another pixel" in run("generate", "--from", "d.png", "--weights", weights, "-o", "e.png").err


def test_show_without_a_file_lists_models_and_loras(run, adapters):
    ran = run("show")
    assert ran.code == 0 and "LoRA    pixel" in ran.out and "model   emoji" in ran.out and ran.err == ""
    assert json.loads(run("show", "--json").out)["loras"] == {
        "pixel": str(adapters / "lora-pixel.safetensors")
    }
    assert one_line(run("generate", "a", "--lora", "oil"), ["use one of pixel"])


def test_other_steps_choose_anew_whether_the_adapter_for_few_is_on(run, weights):
    run("generate", "heart", "--weights", weights, "--steps", 1, "-o", "a.png")
    with Image.open("a.png") as image:
        png.write_image("b.png", image, {**png.read_parameters("a.png"), "few": True})
    assert one_line(run("generate", "--from", "b.png", "--weights", weights, "-q"), ["no adapter for few"])
    assert run("generate", "--from", "b.png", "--weights", weights, "--steps", 5, "-o", "c.png").code == 0


def test_mix_is_a_sheet_of_pairs_made_by_its_seed(run, weights):
    flags = ["--weights", weights, "--steps", 2, "--seed", 5, "--between", 1]
    ran = run("mix", "❤️", "blue heart", "heart", *flags, "-o", "a.png", "--json")
    record = json.loads(ran.out)
    assert len(record["pictures"]) == 12 and record["pictures"][:3] == ["red heart", "50 %", "blue heart"]
    run("mix", "❤️", "blue heart", "heart", *flags, "-o", "b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
