from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rfkernels import load_lora, set_adapters, unload_lora
from rfkernels.models.blocks import as_neighbours
from rfkernels.models.checkpoint import write_emoji
from rfkernels.models.emoji import EmojiConfig, EmojiFlow, load_emoji
from rfkernels.ops import noise_keys, philox_normal
from rfkernels.train import loop, lora, lowrank, pairs, styles
from rfkernels.train.emoji import FlowTask, Levels
from rfkernels.train.scenes import Scene
from tests.tiny import tiny_model
from tests.train.banks import make_bank
from tests.train.test_loop import same
from tests.train.test_reflow import stopped_at

RECIPE = loop.Recipe(steps=6, batch=8, warmup=2, adam_lr=4e-3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    write_emoji(tiny_model(), path, {})
    return path


@pytest.fixture(scope="module")
def bank():
    return make_bank()


def settings(weights, bank, **changes):
    return {"start": weights, "bank": bank, "recipe": RECIPE, "compile": False, **changes}


def disc(colour: tuple[float, float, float]) -> torch.Tensor:
    """A disc on nothing, [1, 4, 128, 128] of 0 .. 1."""
    at = torch.arange(128) - 63.5
    inside = (at[:, None].square() + at.square() < 50**2).float()
    return inside * torch.tensor([*colour, 1.0])[None, :, None, None]


# ------------------------------------------------------------------------------------------------ styles


def applied(style, c):
    return (styles.STYLES[style](2 * c - 1) + 1) / 2


def test_pixel_art_has_squares_of_mean_colour():
    c = torch.rand(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    c[:, 3] = 1
    c[0, :, :2, :2] = 0  # one square of 2 x 2 is empty
    c[1, :, :2, 0] = 0  # half of one is empty, which is not half covered
    y = applied("pixel", c)
    squares = y.unflatten(2, (16, 2)).unflatten(4, (16, 2))
    assert (squares == squares[:, :, :, :1, :, :1]).all()
    torch.testing.assert_close(y[:, :, 4::2, 4::2], torch.nn.functional.avg_pool2d(c, 2)[:, :, 2:, 2:])
    assert (y[:, :, 0, 0] == 0).all() and set(y[:, 3].unique().tolist()) == {0.0, 1.0}
    covered = c.clone()
    covered[1, :, :2, 0] = 0
    covered[1, :, 1, 0] = torch.tensor([0.2, 0.4, 0.6, 1.0])  # three quarters are covered: the mean of these
    expected = (covered[1, :3, :2, :2].sum((1, 2)) / 3).clamp(max=1)
    torch.testing.assert_close(applied("pixel", covered)[1, :3, 0, 0], expected)


def test_pixel_art_of_pixel_art_is_the_same():
    once = applied("pixel", disc((0.9, 0.6, 0.1)))
    torch.testing.assert_close(applied("pixel", once), once)


def distance_to(mask):
    """The distance of every pixel to the nearest one of `mask` [size, size]."""
    y, x = torch.nonzero(mask, as_tuple=True)
    size = mask.shape[-1]
    at = torch.arange(size)
    d = (at[:, None, None] - y).square() + (at[None, :, None] - x).square()
    return d.amin(-1).sqrt()


def test_outline_is_a_white_edge_then_a_dark_one():
    c = disc((0.1, 0.3, 0.9))
    y = applied("outline", c)[0]
    inset = styles._inset(c)[0]
    far = distance_to(inset[3] > 0.99)
    inside = inset[3] > 1 - 1e-6
    torch.testing.assert_close(y[:, inside], inset[:, inside], rtol=0, atol=1e-5)
    white = (far <= 3.6) & (inset[3] == 0)  # 0.03 of 128 pixels: four
    assert white.sum() > 100 and (y[:, white] > 0.999).all()
    dark = (y[3] > 0.9) & (y[:3].amax(0) < 0.1)
    assert dark.sum() > 100 and (far[dark] > 4).all() and (far[dark] < 9).all()
    assert (y[:, far > 10] == 0).all()


def test_glow_is_a_halo_in_the_picture_s_colour():
    c = disc((0.86, 0.12, 0.16))
    y = applied("glow", c)[0]
    inset = styles._inset(c)[0]
    inside = inset[3] > 1 - 1e-6
    torch.testing.assert_close(y[:, inside], inset[:, inside], rtol=0, atol=1e-5)
    far = distance_to(inset[3] > 0.99)
    rings = [y[:, (far > r) & (far <= r + 2)].mean(1) for r in (2, 4, 6, 8)]
    assert all(a[3] > b[3] > 0 for a, b in pairwise(rings))  # falls with distance
    colour = rings[1][:3] / rings[1][3]
    assert colour[0] > 0.95 and colour[1] < 0.3 and colour[2] < 0.35
    assert y[3].amax() <= 1 + 1e-6 and (y[:3] <= y[3] + 1e-6).all()


@pytest.mark.parametrize("style", styles.STYLES)
def test_styles_keep_nothing_nothing_and_have_any_size(style):
    assert (applied(style, torch.zeros(1, 4, 20, 20)) == 0).all()
    y = applied(style, torch.ones(1, 4, 17, 17))
    assert y.shape == (1, 4, 17, 17) and y.isfinite().all() and (y[0, :, 8, 8] > 0.999).all()


def test_style_is_of_the_objects_and_not_of_the_background(bank, weights):
    config, levels, cpu = load_emoji(weights).config, Levels(), torch.device("cpu")
    task = lora.StyleTask(bank, config, RECIPE, levels, cpu, style="pixel", word="pixel")
    plain = FlowTask(bank, config, RECIPE, levels, cpu)
    keys, rows, shares, mask, packed = task.inputs(1)
    _, plain_rows, _, plain_mask, plain_packed = plain.inputs(1)
    assert all(map(torch.equal, map(torch.from_numpy, packed), map(torch.from_numpy, plain_packed)))
    asked = plain_mask.any(1)
    assert (mask.sum(1) == (plain_mask.sum(1) + 1).clip(max=16) * asked).all()  # dropped captions stay empty
    assert (rows[asked, 1] == plain_rows[asked, 0]).all() and len({r.tobytes() for r in rows[asked, 0]}) == 1
    x, x0, sigma, *_ = task.prepare(*loop.to_device(cpu, (keys, rows, shares, mask, packed)))
    scenes = task.sampler.scenes(1, 8)
    for picture, scene in zip((x0 + 1) / 2, scenes, strict=True):
        bare = Scene(scene.kind, scene.items)
        front = applied("pixel", (task.renderer([bare]) + 1) / 2)[0]
        ground = torch.tensor([*scene.rgb, 1.0] if scene.rgb else [0.0] * 4)[:, None, None]
        torch.testing.assert_close(picture, front + (1 - front[3:]) * ground)
    assert any(s.rgb for s in scenes) and not all(s.rgb for s in scenes)
    s, noise = sigma[:, None, None, None], philox_normal(x.shape, torch.from_numpy(keys))
    torch.testing.assert_close(x, (1 - s) * x0 + s * noise)


# ---------------------------------------------------------------------------------------------- adapters


def pictures(model) -> torch.Tensor:
    text = model.encode(["red heart", "cat face flat"])
    return model(philox_normal((2, 4, 16, 16), noise_keys(9, 2)), torch.tensor([1.0, 0.5]), text)


def merged(weights: Path, *files: tuple[Path, float]) -> torch.Tensor:
    """Pictures of the model with W + strength alpha / r B A in place of W."""
    model = load_emoji(weights)
    for path, strength in files:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                if key.endswith(".lora_A.weight"):
                    name = key.removesuffix(".lora_A.weight")
                    a, b = file.get_tensor(key).float(), file.get_tensor(f"{name}.lora_B.weight").float()
                    scale = strength * file.get_tensor(f"{name}.alpha").item() / len(a)
                    model.get_submodule(name).weight.add_(scale * b @ a)
    return pictures(model)


def test_adapters_switch_mix_and_leave_the_base(weights, bank, tmp_path):
    files = [lora.train(tmp_path / s, s, **settings(weights, bank, rank=3)) for s in ("pixel", "glow")]
    model = load_emoji(weights)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    base = pictures(model)
    report = load_lora(model, files[0], name="pixel")
    assert set(report.layers) == set(lowrank.targets(load_emoji(weights))) and not report.unknown
    load_lora(model, files[1], name="glow")
    for strengths in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.8)):
        set_adapters(model, ["pixel", "glow"], strengths)
        expected = merged(weights, *zip(files, strengths, strict=True))
        torch.testing.assert_close(pictures(model), expected, rtol=1e-4, atol=1e-4)
        assert (expected - base).abs().max() > 0.01
    set_adapters(model, ["pixel", "glow"], [0.0, 0.0])
    torch.testing.assert_close(pictures(model), base, rtol=1e-4, atol=1e-4)
    unload_lora(model)
    assert torch.equal(pictures(model), base)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_branch_is_the_product_that_the_file_holds():
    layer = torch.nn.Linear(8, 6)
    branch, x = lowrank.LowRank(layer, 2), torch.randn(3, 8)
    with torch.no_grad():
        branch.lora_B.normal_()
        wanted = torch.nn.functional.linear(x, layer.weight + branch.lora_B @ branch.lora_A, layer.bias)
        torch.testing.assert_close(branch(x), wanted)


def test_adapter_is_the_average_of_what_was_trained(weights, bank, tmp_path):
    path = lora.train(tmp_path, "outline", **settings(weights, bank, rank=2, word="sticker"))
    model = load_emoji(weights)
    ema = torch.load(tmp_path / "last.pt", weights_only=True)["ema"]
    ema = as_neighbours(ema, model.config.width, model.head_dim)  # an adapter has the order of the layer
    with safe_open(path, "pt") as file:
        for name in lowrank.targets(model):
            for part in ("A", "B"):
                stored = file.get_tensor(f"{name}.lora_{part}.weight")
                assert torch.equal(stored, ema[f"{name}.lora_{part}"].half())
        metadata = file.metadata()
    assert metadata["base"] == f"sha256:{pairs.digest_of(weights)}" and metadata["style"] == "outline"
    assert "Apache-2.0" in metadata["licence"] and metadata["word"] == "sticker"
    assert '"steps_done": 6' in metadata["training"] and '"style": "outline"' in metadata["training"]


def test_only_branches_are_trained_and_lower_the_error(weights, bank, tmp_path):
    changes = {"recipe": loop.Recipe(steps=40, batch=16, warmup=2, adam_lr=1e-2, ema=0.9)}
    path = lora.train(tmp_path, "pixel", **settings(weights, bank, **changes))
    record = torch.load(tmp_path / "last.pt", weights_only=True)
    base = load_emoji(weights).state_dict()
    assert all(torch.equal(record[part][n], p) for part in ("model", "ema") for n, p in base.items())
    task = lora.StyleTask(
        bank, load_emoji(weights).config, RECIPE, Levels(), torch.device("cpu"), style="pixel"
    )
    inputs = [task.prepare(*loop.to_device(torch.device("cpu"), task.inputs(1000 + k))) for k in range(6)]
    errors = []
    for adapters in ((), (path,)):
        model = load_emoji(weights)
        for file in adapters:
            load_lora(model, file)
        with torch.no_grad():
            errors.append(sum(task.loss(model, *i).item() for i in inputs))
    assert errors[1] < 0.85 * errors[0]


def test_stopped_adapter_goes_on_to_the_same_bits(weights, bank, tmp_path, monkeypatch):
    lora.train(tmp_path / "whole", "glow", **settings(weights, bank))
    with monkeypatch.context() as patch:
        stopped_at(patch, lora.StyleTask, 3, "inputs")
        lora.train(tmp_path / "parts", "glow", **settings(weights, bank))
    assert torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["step"] == 3
    again = lora.train(tmp_path / "parts", "glow", **settings(weights, bank), resume=True)
    records = [torch.load(tmp_path / f / "last.pt", weights_only=True) for f in ("parts", "whole")]
    assert all(same(records[0][part], records[1][part]) for part in ("model", "ema", "adam"))
    whole = tmp_path / "whole" / "glow.safetensors"
    assert pictures_with(weights, again).equal(pictures_with(weights, whole))
    with pytest.raises(FileNotFoundError, match="start without resume"):
        lora.train(tmp_path / "new", "glow", **settings(weights, bank), resume=True)


def pictures_with(weights, path):
    model = load_emoji(weights)
    load_lora(model, path)
    return pictures(model)


def test_rank_follows_the_size_of_the_file(tmp_path):
    with torch.device("meta"):
        model = EmojiFlow(EmojiConfig(size=128, patch=8, width=320, heads=5, single_blocks=6))
    assert lowrank.largest_rank(model, lora.LARGEST, 8) == 4
    small = tiny_model()
    assert lowrank.largest_rank(small, lora.LARGEST, 8) == 8
    layers = lowrank.targets(small)
    assert len(layers) == 4 * 2 + 2 + 1 and "out" in layers and "text.join" not in layers
    each = 2 * sum(m.in_features + m.out_features for m in layers.values())
    limit = 3 * each + lowrank.NAMES * len(layers)
    assert lowrank.largest_rank(small, limit, 8) == 3 and lowrank.largest_rank(small, limit - 1, 8) == 2
    with pytest.raises(ValueError, match=r"a file of rank 1 needs \d+ bytes, got a limit of 1000"):
        lowrank.largest_rank(small, 1000, 8)
    model = lowrank.adapt(small, 3)
    state = loop.new_state(model.train(), RECIPE, torch.device("cpu"))
    start = tmp_path / "base.safetensors"
    write_emoji(tiny_model(), start, {})
    path = lowrank.write_lora(state, tmp_path / "a.safetensors", start, style="none")
    assert path.stat().st_size <= limit


def test_unusable_settings_are_refused(weights, bank, tmp_path):
    with pytest.raises(ValueError, match="a style of pixel, outline, glow is required, got 'cubism'"):
        lora.train(tmp_path, "cubism", **settings(weights, bank))
    with pytest.raises(ValueError, match="rank of an adapter must be at least 1, got 0"):
        lora.train(tmp_path, "glow", **settings(weights, bank, rank=0))
