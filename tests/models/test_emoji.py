import numpy as np
import pytest
import torch

from rfkernels.models.emoji import SIGMA_MIN, EmojiFlow, to_images
from tests.tiny import CONFIG, tiny_model

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def sample(batch: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 16, 16, generator=g), torch.rand(batch, generator=g)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_velocity_has_the_shape_and_type_of_its_sample(device, dtype):
    model = tiny_model().to(device, dtype)
    x, sigma = (t.to(device) for t in sample(3))
    text = model.encode(["a red heart", "", "blue circle on red background"])
    expected = tiny_model()(
        x.cpu(), sigma.cpu(), tiny_model().encode(["a red heart", "", "blue circle on red background"])
    )
    got = model(x, sigma, text)
    assert got.shape == x.shape and got.dtype == x.dtype and got.device == x.device
    x0, x0_expected = (
        x.cpu() - s * v.cpu() for s, v in ((_floor(sigma.cpu()), got), (_floor(sigma.cpu()), expected))
    )
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(x0, x0_expected, rtol=tolerance, atol=tolerance)


def _floor(sigma: torch.Tensor) -> torch.Tensor:
    return sigma.clamp(min=SIGMA_MIN)[:, None, None, None]


def test_samples_of_a_batch_do_not_see_each_other():
    model, (x, sigma) = tiny_model(), sample(3)
    prompts = ["red heart", "blue circle on red background", ""]
    together = model(x, sigma, model.encode(prompts))
    for i, prompt in enumerate(prompts):
        alone = model(x[i : i + 1], sigma[i : i + 1], model.encode([prompt]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_velocity_is_that_of_the_predicted_picture():
    model, (x, _) = tiny_model(), sample(2)
    text = model.encode(["red", "blue"])
    for level in (1.0, 0.3, 0.01):
        sigma = torch.full((2,), level)
        x0 = model.predict(x, sigma, text.rows, text.weights, text.mask)
        torch.testing.assert_close(model(x, sigma, text), (x - x0) / max(level, SIGMA_MIN))


@pytest.mark.parametrize("changed", ["text", "sigma", "x"])
def test_velocity_depends_on_every_input(changed):
    model, (x, sigma) = tiny_model(), sample(1)
    other = {
        "text": (x, sigma, model.encode(["blue"])),
        "sigma": (x, sigma / 2, model.encode(["red"])),
        "x": (x.flip(-1), sigma, model.encode(["red"])),
    }[changed]
    a, b = (
        model.predict(x, s, t.rows, t.weights, t.mask)
        for x, s, t in ((x, sigma, model.encode(["red"])), other)
    )
    assert (a - b).abs().max() > 1e-3


def test_patches_go_back_where_they_came_from():
    model, (x, _) = tiny_model(), sample(2)
    tokens = model.patchify(x)
    assert tokens.shape == (2, 16, 64)
    torch.testing.assert_close(tokens[0, 5], x[0, :, 4:8, 4:8].flatten())
    torch.testing.assert_close(model.unpatchify(tokens), x)


def test_trained_and_sampled_paths_agree():
    model, (x, sigma) = EmojiFlow(CONFIG), sample(2)
    text = model.encode(["red heart", ""])
    trained = model(x, sigma, text)
    assert trained.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(model(x, sigma, text), trained)


def test_images_have_straight_alpha():
    x = torch.full((1, 4, 2, 2), -1.0)
    x[0, :, 0, 0] = torch.tensor([0.0, -1.0, -0.5, 0.0])  # half transparent: (0.5, 0, 0.25) / 0.5
    x[0, :, 1, 1] = torch.tensor([3.0, -3.0, 0.0, 1.0])  # out of range
    (image,) = to_images(x)
    assert image.mode == "RGBA"
    pixels = np.asarray(image)
    assert pixels[0, 0].tolist() == [255, 0, 128, 128]
    assert pixels[1, 1].tolist() == [255, 0, 128, 255]
    assert pixels[0, 1].tolist() == [0, 0, 0, 0]
