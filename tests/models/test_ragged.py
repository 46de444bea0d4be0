"""Lumina-Image 2.0 and Z-Image: samples of several lengths, what is kept between steps, what is refused."""

import pytest
import torch

from rfkernels.models.lumina2 import Lumina2
from rfkernels.models.zimage import ZImage
from tests.models.cases import lumina2, zimage
from tests.models.parity import error, normal


def lumina2_model() -> Lumina2:
    torch.manual_seed(0)
    return Lumina2(**lumina2.CONFIG).eval().requires_grad_(False)


def zimage_model(**config) -> ZImage:
    torch.manual_seed(0)
    return ZImage(**zimage.CONFIG | config).eval().requires_grad_(False)


def test_lumina2_samples_of_a_batch_are_apart():
    ours, given = lumina2_model(), lumina2.inputs(lengths=(4, 11, 1))
    together = ours(**given)
    for b, length in enumerate((4, 11, 1)):
        alone = {name: value[b : b + 1] for name, value in given.items()}
        alone["encoder_hidden_states"] = alone["encoder_hidden_states"][:, :length]
        alone["encoder_attention_mask"] = None
        assert error(together[b : b + 1], ours(**alone)) <= 1e-6


def test_lumina2_padding_is_not_read():
    ours, given = lumina2_model(), lumina2.inputs(lengths=(4, 9))
    expected = ours(**given)
    given["encoder_hidden_states"][0, 4:] = 1e4
    assert torch.equal(ours(**given), expected)


def test_lumina2_keeps_captions_and_rotation():
    ours, given = lumina2_model(), lumina2.inputs(lengths=(4, 11))
    lengths = given["encoder_attention_mask"].sum(1)
    rotation = ours.rotation(given["hidden_states"], lengths, 11)
    captions = ours.captions(given["encoder_hidden_states"], lengths, rotation[1])
    assert torch.equal(ours(**given, rotation=rotation, captions=captions), ours(**given))


def test_zimage_samples_of_a_batch_are_apart():
    ours, given = zimage_model(), zimage.inputs(sizes=((1, 6, 10), (1, 10, 14)), texts=(33, 7))
    together = ours(**given)
    for b, image in enumerate(together):
        (alone,) = ours(**{name: value[b : b + 1] for name, value in given.items()})
        assert error(image, alone) <= 1e-6


@pytest.mark.parametrize("mode", ["z-image, captions of two lengths", "z-image-omni, two samples"])
def test_zimage_keeps_a_plan(mode):
    (case,) = (c for c in zimage.CASES if c.name == mode)
    ours, given = zimage_model(**case.config), case.inputs()
    sizes = {name: value for name, value in given.items() if name != "t"}
    for result, expected in zip(ours(**given, plan=ours.plan(**sizes)), ours(**given), strict=True):
        assert torch.equal(result, expected)


def refused(**changes) -> str:
    with pytest.raises(ValueError) as caught:
        zimage_model()(**zimage.inputs() | changes)
    return str(caught.value)


def test_zimage_refusals():
    images, texts = [[normal(4, 1, 6, 10)]] * 2, [[normal(3, 20)]] * 2
    assert "got 2, 1 and 2" in refused(cap_feats=[normal(3, 20)])
    assert "must be one of 2-1, got 4-1" in refused(patch_size=4)
    assert "images, or lists beside image_noise_mask, got list" in refused(x=images)
    assert "lists beside image_noise_mask, got Tensor" in refused(image_noise_mask=[[1], [1]])
    omni = {"x": images, "cap_feats": texts}
    assert "got 2 for 1 images (1 given) and 1 captions" in refused(**omni, image_noise_mask=[[1, 0], [1]])
    assert "(0 given)" in refused(**omni | {"x": [[None]] * 2}, image_noise_mask=[[1], [1]])
    assert "must divide the size" in refused(x=[normal(4, 1, 5, 10)] * 2)
    with pytest.raises(ValueError, match="must add up to 72 / 3"):
        zimage_model(axes_dims=[8, 8, 4])
