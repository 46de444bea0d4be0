"""Between two prompts: exact at both ends, smooth between, and blind to padding."""

import pytest
import torch

from rfkernels.editing.mix import Features, features_of, mixed, slerp, with_features
from tests.tiny import tiny_model

SIGMA = torch.tensor([0.7])


def noise() -> torch.Tensor:
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))


def of(model, prompt: str) -> Features:
    return features_of(model, [prompt])


def test_slerp_turns_at_an_even_pace_and_lengths_go_straight():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    for t in (0.25, 0.5, 0.75):
        angle = torch.tensor(t * torch.pi / 2)
        expected = (2 + 2 * t) * torch.stack([angle.cos(), angle.sin()])
        torch.testing.assert_close(slerp(a, b, t), expected, atol=1e-6, rtol=1e-6)
    zero = torch.zeros(2)
    torch.testing.assert_close(slerp(zero, b, 0.5), b / 2)
    torch.testing.assert_close(slerp(a, -a, 0.25), a / 2)
    assert slerp(a, a, 0.3).isfinite().all() and torch.equal(slerp(a, b, 1), b)
    with pytest.raises(ValueError, match="0 <= t <= 1"):
        slerp(a, b, 1.5)


def test_given_features_are_read_as_the_prompt_is():
    model = tiny_model()
    text = model.encode(["", "red heart"])
    expected = model.guided(noise(), SIGMA, text)
    for found, right in zip(
        with_features(model, of(model, "red heart"))(noise(), SIGMA), expected, strict=True
    ):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)


def test_ends_are_the_prompts_and_the_way_between_is_steady():
    model = tiny_model()
    a, b = of(model, "red heart on blue background"), of(model, "circle")
    pair = features_of(model, ["red heart on blue background", "circle"])
    short = Features(pair.words[1:], pair.pooled[1:], pair.mask[1:])  # as b, padded
    velocity = lambda f: with_features(model, f)(noise(), SIGMA)[1]
    torch.testing.assert_close(velocity(mixed(a, short, 1)), velocity(b), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(velocity(mixed(a, short, 0)), velocity(a))
    path = [velocity(mixed(a, short, t)) for t in (0.0, 0.01, 0.5, 0.99)]
    far = (path[0] - velocity(b)).norm()
    assert (path[1] - path[0]).norm() < 0.2 * far
    assert (path[2] - path[0]).norm() > 0.1 * far and (path[2] - velocity(b)).norm() > 0.1 * far
    half = mixed(a, short, 0.5)
    assert half.mask.all() and half.words.isfinite().all()
    torch.testing.assert_close(half.words[0, 3], slerp(a.words[0, 3], short.pooled[0], 0.5))


def test_the_model_is_left_as_it_is():
    model = tiny_model()
    with_features(model, of(model, "red heart"))
    assert type(model.text).__name__ == "TextEncoder"


def test_no_words_at_all_are_finite():
    model = tiny_model()
    pair = features_of(model, ["red heart", ""])
    first, nothing = (
        Features(pair.words[i : i + 1], pair.pooled[i : i + 1], pair.mask[i : i + 1]) for i in (0, 1)
    )
    velocity = with_features(model, mixed(first, nothing, 0.5))(noise(), SIGMA)[1]
    assert velocity.isfinite().all()
