"""V of an inversion in an edit: on the embedded model's blocks and on transformers of diffusers."""

import pytest
import torch

import rfkernels
from rfkernels.editing import ValueSharing, feature_bytes, invert, value_layers
from rfkernels.samplers import sample, schedule
from tests.editing.fields import close
from tests.tiny import tiny_model

GRID, STEPS = schedule("linear", 4), 4


@pytest.fixture(scope="module")
def emoji():
    return tiny_model()


def velocity_of(model, *prompts):
    text = model.encode(list(prompts))
    return lambda x, sigma: model(x, sigma, text)


def picture(batch=1, seed=1):
    return torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def edited(model, sharing=None, *, target="blue circle", method="rf-solver", batch=1, steps=STEPS):
    """Inversion of a picture and an edit, with values shared or not."""
    per_step = 2 if method == "rf-solver" else 1
    v, w = velocity_of(model, *["red heart"] * batch), velocity_of(model, *[target] * batch)
    if sharing:
        v, w = sharing.storing(v, steps, per_step), sharing.injecting(w, steps, per_step)
    grid = schedule("linear", steps)
    noise = invert(v, picture(batch), grid, method=method)
    return sample(w, noise, grid, method=method)


def test_it_changes_an_edit_and_only_within_its_context(emoji):
    plain = edited(emoji)
    with ValueSharing(emoji, inject=2) as sharing:
        shared = edited(emoji, sharing)
        outside = edited(emoji)
    assert torch.equal(outside, plain) and torch.equal(edited(emoji), plain)
    assert (shared - plain).abs().max() > 1e-4
    assert not any(m._forward_hooks for m in emoji.modules())
    with ValueSharing(emoji, inject=0) as sharing:
        assert torch.equal(edited(emoji, sharing), plain) and not sharing.values


@pytest.mark.parametrize("matched", [False, True])
def test_keys_are_of_the_noisier_end(emoji, matched, monkeypatch):
    """The value that an evaluation gets was noted at the level that the keys say."""
    noted, asked, level = {}, [], [0.0]
    monkeypatch.setattr("rfkernels.editing.features._replaced",
                        lambda out, stored, *_: asked.append((level[0], noted[id(stored)])))  # fmt: skip
    model = velocity_of(emoji, "red heart")

    def at(x, sigma):
        level[0] = round(sigma[0].item(), 6)
        return model(x, sigma)

    with ValueSharing(emoji, ["single_blocks.0"], inject=2, matched_time=matched) as sharing:
        keep = sharing.values

        class Noting(dict):
            def __setitem__(self, key, value):
                noted[id(value)] = level[0]
                super().__setitem__(key, value)

        sharing.values = Noting(keep)
        noise = invert(sharing.storing(at, STEPS, 2), picture(), GRID)
        sample(sharing.injecting(at, STEPS, 2), noise, GRID, method="rf-solver")
    if matched:
        assert asked == [(0.875, 0.875), (0.75, 0.75), (0.625, 0.625)]
    else:
        assert asked == [(1.0, 0.75), (0.875, 0.875), (0.75, 0.5), (0.625, 0.625)]


def test_what_is_noted_comes_back(emoji):
    """The same run again, with its own values put in, is the same run."""
    x, v = picture(), velocity_of(emoji, "red heart")
    level = torch.full((1,), 0.6)
    with ValueSharing(emoji, inject=1) as sharing, torch.no_grad():
        first = sharing.storing(v, 1)(x, level)
        assert torch.equal(sharing.injecting(v, 1)(x, level), first)
        other = sharing.injecting(velocity_of(emoji, "blue circle"), 1)(x, level)
        assert not torch.equal(other, velocity_of(emoji, "blue circle")(x, level))
        for stored in sharing.values.values():
            stored.mul_(1.5)
        assert not torch.equal(sharing.injecting(v, 1)(x, level), first)


def test_guidance_doubles_the_batch(emoji):
    x, level = picture(2), torch.full((2,), 0.6)
    text = emoji.encode(["", "", "blue circle", "red heart"])
    with ValueSharing(emoji, inject=1) as sharing, torch.no_grad():
        sharing.storing(velocity_of(emoji, "red heart", "blue circle"), 1)(x, level)
        u, c = sharing.injecting(lambda x, s: emoji.guided(x, s, text), 1)(x, level)
        alone = sharing.injecting(velocity_of(emoji, "blue circle", "red heart"), 1)(x, level)
    close(c, alone, 1e-4)
    assert not torch.equal(u, c)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_memory(emoji, device):
    with ValueSharing(emoji, lambda i, name: i >= 1, inject=3, device=device) as sharing:
        edited(emoji, sharing, batch=2)
        tokens = 16 + 2  # of the picture and of the text
        assert sharing.nbytes == feature_bytes(tokens, 64, blocks=1, inject=3, batch=2, element=4)
        assert list(sharing.layers) == ["single_blocks.0"]
        sharing.clear()
        assert sharing.nbytes == 0
    assert feature_bytes((4096, 512), 3072, blocks=18, inject=5) == pytest.approx(5.1e9, rel=2e-3)


def test_refusals(emoji):
    v, x, level = velocity_of(emoji, "red heart"), picture(), torch.full((1,), 0.6)
    with pytest.raises(ValueError, match=r"must be among double_blocks\.0, single_blocks\.0, got attn"):
        ValueSharing(emoji, ["attn"])
    with pytest.raises(ValueError, match="Linear has no self-attention that is known"):
        ValueSharing(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got none"):
        ValueSharing(emoji, [])
    sharing = ValueSharing(emoji, inject=1)
    with pytest.raises(RuntimeError, match="outside of its context"):
        sharing.storing(v, 1)(x, level)
    with sharing, torch.no_grad():
        with pytest.raises(RuntimeError, match=r"no V of double_blocks\.0 at step 0, evaluation 0"):
            sharing.injecting(v, 1)(x, level)
        once = sharing.storing(v, 1)
        once(x, level)
        with pytest.raises(RuntimeError, match="1 steps of 1 evaluations are over"):
            once(x, level)
        two = velocity_of(emoji, *["red heart"] * 2)
        sharing.clear()
        sharing.storing(two, 1)(picture(2), torch.full((2,), 0.6))
        with pytest.raises(ValueError, match="whole multiples of the batch"):
            sharing.injecting(v, 1)(x, level)


def test_prompts_of_other_lengths(emoji):
    """With `picture` text keeps its own values."""
    target = "blue circle on red background"
    with ValueSharing(emoji, inject=1) as sharing, pytest.raises(ValueError, match="length of text"):
        edited(emoji, sharing, target=target)
    plain = edited(emoji, target=target)
    with ValueSharing(emoji, inject=2, picture=slice(0, 16)) as sharing:
        assert not torch.equal(edited(emoji, sharing, target=target), plain)
        assert {v.shape for v in sharing.values.values()} == {(1, 16, 64)}
        assert {key[1] for key in sharing.values} == {0} and sharing.layers.keys() == value_layers(
            emoji
        ).keys()


diffusers = pytest.importorskip("diffusers")
NAMES = {"flux": 3, "sd3": 6, "sd35": 8, "sd3_fused": 6, "wan": 2, "hidream": 3, "auraflow": 3, "lumina2": 3}


def made(name):
    from tests.integrations.models import made

    return made(name, torch.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ours", [False, True])
@torch.no_grad()
def test_transformers_of_diffusers(name, ours):
    """Values put back are the run itself; of another picture they change it; hooks go."""
    model, inputs = made(name)
    if ours:
        rfkernels.use_attention(model)
    assert sum(map(len, value_layers(model).values())) == NAMES[name]
    run = lambda x, _: model(**{**inputs, "hidden_states": x}, return_dict=False)[0]
    x, level = inputs["hidden_states"], None
    plain, other = run(x, level), torch.randn_like(x)
    with ValueSharing(model, inject=1, device="cpu") as sharing:
        assert torch.equal(sharing.storing(run, 1)(x, level), plain)
        again = sharing.injecting(run, 1)(x, level)
        changed = sharing.injecting(run, 1)(other, level)
        assert len(sharing.values) == NAMES[name]
    close(again, plain, 1e-5)
    assert (changed - run(other, level)).abs().max() > 1e-3
    assert torch.equal(run(x, level), plain)
    assert not any(m._forward_hooks for m in model.modules())


@torch.no_grad()
def test_blocks_of_flux_are_chosen():
    model, inputs = made("flux")
    chosen = ValueSharing(model, lambda i, name: name.startswith("single"))
    assert list(chosen.layers) == ["single_transformer_blocks.0.attn"]
    run = lambda x, _: model(**{**inputs, "hidden_states": x}, return_dict=False)[0]
    with ValueSharing(model, ["single_transformer_blocks.0.attn"], inject=1) as sharing:
        sharing.storing(run, 1)(inputs["hidden_states"], None)
        ((_, v),) = sharing.values.items()
        assert v.shape == (2, 20, 32)  # text and image
