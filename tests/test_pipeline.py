"""The pipeline: what determines a picture, what it refuses, what it never returns."""

import json
import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image

from rfkernels import pipeline, samplers
from rfkernels.models.emoji import EmojiConfig, EmojiFlow
from rfkernels.pipeline import InputError, Pipeline, ResultError

TINY = EmojiConfig(size=16, patch=4, width=64, heads=1, double_blocks=1, single_blocks=1, table=64, embed=16)


def tiny_model() -> EmojiFlow:
    torch.manual_seed(0)
    model = EmojiFlow(TINY)
    for weight in (model.out.weight, model.modulation.weight):  # zero at the start of training
        torch.nn.init.normal_(weight, std=0.05)
    words = [text_key(word) for word in ("red", "heart", "blue", "star", "noto", "flat")]
    model.known_words = torch.tensor(words, dtype=torch.int32)
    return model.eval()


def text_key(word: str) -> int:
    from rfkernels.models.text import word_key

    return word_key(word)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline("emoji", tiny_model(), torch.device("cpu"), torch.float32, "0" * 64, 0.25)


def pixels(image: Image.Image) -> bytes:
    return image.tobytes()


def close(a: Image.Image, b: Image.Image, steps: int = 2) -> bool:
    """Equal but for rounding: a batch of another size may sum in another order."""
    return max(abs(x - y) for x, y in zip(pixels(a), pixels(b), strict=True)) <= steps


def test_a_call_gives_rgba_pictures_and_what_made_them(pipe):
    result = pipe(["red heart", "blue star"], n=2, steps=3, seed=5)
    assert [image.mode for image in result.images] == ["RGBA"] * 4
    assert {image.size for image in result.images} == {(16, 16)}
    assert result.seeds == (5, 6, 7, 8) and result.warnings == ()
    assert result.seconds["load"] == 0.25
    assert result.seconds["total"] == pytest.approx(result.seconds["load"] + result.seconds["sample"])
    parameters = json.loads(json.dumps(result.parameters))
    assert parameters["prompts"] == ["red heart", "blue star"] and parameters["method"] == "ab2"
    assert (parameters["n"], parameters["steps"], parameters["seed"], parameters["size"]) == (2, 3, 5, 16)
    assert (parameters["device"], parameters["dtype"], parameters["weights"]) == (
        "cpu",
        "float32",
        "sha256:" + "0" * 64,
    )


def test_the_same_call_gives_the_same_bits_and_another_seed_another_picture(pipe):
    first, again, other = (pipe("red heart", steps=2, seed=seed).images[0] for seed in (1, 1, 2))
    assert pixels(first) == pixels(again) != pixels(other)


def test_picture_i_is_reproducible_alone_with_seed_plus_i(pipe):
    together = pipe(["red heart", "blue star"], n=2, steps=4, seed=10).images
    assert close(together[3], pipe("blue star", steps=4, seed=13).images[0])
    assert not close(together[3], pipe("blue star", steps=4, seed=10).images[0])


def test_chunks_do_not_change_the_pictures(pipe, monkeypatch):
    whole = pipe("red heart", n=5, steps=3).images
    monkeypatch.setattr(pipeline, "_CHUNK_PIXELS", 2 * 16**2)
    calls: list[tuple[int, int]] = []
    parts = pipe("red heart", n=5, steps=3, progress=lambda done, total: calls.append((done, total))).images
    assert all(close(a, b) for a, b in zip(whole, parts, strict=True))
    assert calls == [(done, 9) for done in range(1, 10)]


def test_guidance_one_is_the_conditional_model_and_scales_extrapolate(pipe):
    """One Euler step is linear in the velocity: x(w) = x(0) + w (x(1) - x(0)), seen through the callback."""
    states = {}
    for guidance in (0.0, 1.0, 4.0):
        keep = lambda info, guidance=guidance: states.__setitem__(guidance, info.x.clone())
        pipe("red heart", steps=1, method="euler", guidance=guidance, callback=keep)
    expected = states[0.0] + 4 * (states[1.0] - states[0.0])
    assert (states[1.0] - states[0.0]).abs().max() > 1e-3
    torch.testing.assert_close(states[4.0], expected, rtol=1e-4, atol=1e-4)


def test_an_empty_prompt_is_unconditional_and_says_so(pipe):
    result = pipe("  ", steps=2)
    assert any("unconditional" in warning for warning in result.warnings)
    assert pixels(result.images[0]) == pixels(pipe("", steps=2, guidance=7.0).images[0])


def test_difficult_prompts_give_pictures_with_warnings(pipe):
    assert "zorblax" in " ".join(pipe("a red zorblax", steps=1).warnings)
    assert "cut to its first" in " ".join(pipe("red " * 2500, steps=1).warnings)
    assert "were not read" in " ".join(pipe("red " * 20, steps=1).warnings)
    for prompt in ("赤いハート", "قلب", "❤", "\udcff", "a\0b", "\n"):
        assert len(pipe(prompt, steps=1).images) == 1
    many = pipe(" ".join(f"w{i}" for i in range(12)), steps=1).warnings
    assert len(many) == 1 and "and 4 more" in many[0]


def test_style_is_a_word_of_the_caption(pipe):
    plain, styled, spelled = (
        pipe(prompt, steps=2, style=style).images[0]
        for prompt, style in (("red heart", None), ("red heart", "flat"), ("flat red heart", None))
    )
    assert pixels(styled) == pixels(spelled) != pixels(plain)


@pytest.mark.parametrize(
    "method, schedule",
    [
        *((m, "linear") for m in samplers.METHODS),
        *(("euler", s) for s in samplers.SCHEDULES if s != "linear"),
    ],
)
def test_every_method_and_schedule_runs_and_counts(pipe, method, schedule):
    calls: list[tuple[int, int]] = []
    options = {"shift": 3.0} if schedule == "shift" else {}
    progress = lambda done, total: calls.append((done, total))
    result = pipe("red heart", steps=2, method=method, schedule=schedule, progress=progress, **options)
    assert len(result.images) == 1
    if samplers.METHODS[method].adaptive:
        assert calls == [(done, done) for done in range(1, len(calls) + 1)] and len(calls) > 8
    else:
        total = samplers.nfe(method, 2) - {"heun": 1, "rk4": 3}.get(method, 0)  # none at level 0
        assert calls == [(done, total) for done in range(1, total + 1)]


def test_noise_of_a_method_is_that_of_the_picture_alone(pipe):
    together = pipe(["red heart", "blue star"], steps=3, method="lcm", seed=10).images
    assert close(together[1], pipe("blue star", steps=3, method="lcm", seed=11).images[0])
    assert not close(together[1], pipe("blue star", steps=3, method="lcm", seed=12).images[0])


def test_random_seed_is_recorded_and_gives_the_picture_again(pipe):
    result = pipe("red heart", steps=2, seed=-1)
    again = pipe("red heart", steps=2, seed=result.parameters["seed"])
    assert pixels(result.images[0]) == pixels(again.images[0])
    assert result.parameters["seed"] != pipe("red heart", steps=1, seed=-1).parameters["seed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, got 0"),
        ({"steps": -3}, "got -3"),
        ({"steps": 10**9}, "got 1000000000"),
        ({"steps": 2.5}, "got 2.5"),
        ({"n": 0}, "n must be"),
        ({"n": 100_000}, "at most 4096"),
        ({"method": "dpm"}, "unknown method 'dpm': use one of euler, "),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
        ({"guidance": float("inf")}, "guidance must be a finite number"),
        ({"seed": -2}, "seed must be"),
        ({"seed": 2**63}, "seed must be"),
        ({"schedule": "kl"}, "unknown schedule 'kl': use one of linear, "),
        ({"shift": 0.0}, "shift must be a positive number"),
        ({"shift": 3.0, "schedule": "linear"}, "go together, got linear, 3.0"),
        ({"lora": "oil"}, "unknown LoRA 'oil'"),
        ({"lora": {"oil": "strong"}}, "must be a number"),
        ({"lora": {"oil": float("nan")}}, "from -10 to 10, got nan for oil"),
        ({"few": True}, "no adapter for few steps"),
        ({"schedule": "shift"}, "go together, got shift, None"),
        ({"size": 32}, "does not know size 32: use 16"),
        ({"style": "oil"}, "unknown style 'oil': use one of noto"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [3]}, "a prompt must be text, got int"),
    ],
)
def test_refuses_with_one_line_that_says_what_to_do(pipe, arguments, message):
    prompts = arguments.pop("prompts", "red heart")
    with pytest.raises(InputError) as caught:
        pipe(prompts, **arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_refuses_devices_and_dtypes_that_are_not_there():
    for device, message in [("gpu", "unknown device"), ("mps", "not supported"), ("cuda:99", "is not here")]:
        with pytest.raises(InputError, match=message):
            pipeline.resolve_device(device)
    assert pipeline.resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="unknown dtype 'int8'"):
        pipeline.resolve_dtype("int8", torch.device("cpu"))
    assert pipeline.resolve_dtype("bf16", torch.device("cpu")) is torch.bfloat16
    with pytest.raises(InputError, match="unknown model 'flux'"):
        Pipeline.load("flux")


def test_never_returns_pictures_that_are_not_finite():
    model = tiny_model()
    torch.nn.init.constant_(model.out.bias, float("nan"))
    broken = Pipeline("emoji", model, torch.device("cpu"), torch.float32, "", 0.0)
    with pytest.raises(ResultError, match="not finite"):
        broken("red heart", steps=1)


def test_half_precision_models_keep_the_state_in_float32(pipe):
    half = Pipeline("emoji", tiny_model().bfloat16(), torch.device("cpu"), torch.bfloat16, "", 0.0)
    seen, exact = [], []
    result = half("red heart", steps=2, callback=lambda info: seen.append(info.x))
    pipe("red heart", steps=2, callback=lambda info: exact.append(info.x))
    assert [x.dtype for x in seen] == [torch.float32] * 2 and result.parameters["dtype"] == "bfloat16"
    assert 0 < (seen[-1] - exact[-1]).std() < 0.1 * exact[-1].std()


def test_threads_share_a_pipeline(pipe):
    alone = [pixels(pipe("red heart", steps=2, seed=seed).images[0]) for seed in range(4)]
    found: dict[int, bytes] = {}

    def draw(seed: int) -> None:
        found[seed] = pixels(pipe("red heart", steps=2, seed=seed).images[0])

    workers = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [found[seed] for seed in range(4)] == alone


def test_a_callback_can_stop_early(pipe):
    seen = []
    pipe("red heart", steps=5, callback=lambda info: seen.append(info.step) or len(seen) == 2)
    assert len(seen) == 2


def with_config(**changes) -> Pipeline:
    model = tiny_model()
    model.config = replace(TINY, **changes)
    return Pipeline("emoji", model, torch.device("cpu"), torch.float32, "", 0.0)


def test_sampling_is_the_models_own_where_nothing_is_said():
    own = with_config(steps=3, guidance=2.0, shift=2.5, method="heun")
    used = own("red heart").parameters
    expected = {"steps": 3, "guidance": 2.0, "schedule": "shift", "shift": 2.5, "method": "heun"}
    assert {name: used[name] for name in expected} == expected
    said = with_config()("red heart", steps=3, guidance=2.0, schedule="shift", shift=2.5, method="heun")
    assert pixels(own("red heart").images[0]) == pixels(said.images[0])
    assert (
        own("red heart", steps=2, guidance=1.0).parameters["method"],
        with_config().model.config.steps,
    ) == (
        "heun",
        8,
    )


@pytest.mark.parametrize(
    ("shift", "asked", "expected"),
    [
        (1.0, {}, ("linear", None)),
        (1.0, {"shift": 3.0}, ("shift", 3.0)),
        (2.0, {}, ("shift", 2.0)),
        (2.0, {"shift": 3.0}, ("shift", 3.0)),
        (2.0, {"schedule": "linear"}, ("linear", None)),
        (2.0, {"schedule": "shift"}, ("shift", 2.0)),
        (2.0, {"schedule": "karras"}, ("karras", None)),
    ],
)
def test_a_shift_of_the_model_is_a_schedule(shift, asked, expected):
    used = with_config(shift=shift)("red heart", steps=2, **asked).parameters
    assert (used["schedule"], used["shift"]) == expected


def test_emoji_in_a_prompt_are_read_as_words(pipe):
    drawn, spelled = pipe("❤️", steps=2), pipe("red heart", steps=2)
    assert pixels(drawn.images[0]) == pixels(spelled.images[0])
    assert drawn.warnings == () and drawn.parameters["prompts"] == ["❤️"]
    assert "dark, sunglasses" in " ".join(pipe("🕶️", steps=1).warnings)
