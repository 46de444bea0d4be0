"""What Wan has beside diffusers' model: kept contexts, a row per distinct time; and what it refuses."""

import pytest
import torch

from rfkernels.models.wan import Wan
from tests.models.cases.wan import CASES, CONFIG, IMAGE, inputs
from tests.models.parity import normal

NAMES = ("encoder_hidden_states", "encoder_hidden_states_image")


def model(**config) -> Wan:
    torch.manual_seed(0)
    return Wan(**CONFIG | config).eval().requires_grad_(False)


@pytest.mark.parametrize("image", [0, 7])
def test_a_context_is_kept(image):
    ours = model(**IMAGE if image else {})
    given = inputs(channels=9 if image else 4, image=image)
    text = [given.pop(name) for name in list(given) if name.startswith("encoder")]
    expected = ours(**given, **dict(zip(NAMES, text, strict=False)))
    assert torch.equal(ours(**given, context=ours.context(*text)), expected)


def test_a_rotation_is_kept():
    ours, given = model(), inputs()
    assert torch.equal(ours(**given, rotation=ours.rotation(given["hidden_states"])), ours(**given))


ROWS = {"wan2.2-5b, the first frame is given": 3, "wan-pusa, times of frames": 4}


@pytest.mark.parametrize(("name", "rows"), ROWS.items())
def test_modulation_has_a_row_for_each_distinct_time(name, rows):
    (case,) = (c for c in CASES if c.name == name)
    ours, seen = model(), []
    ours.condition_embedder.time_proj.register_forward_hook(lambda _, args, out: seen.append(len(out)))
    ours(**case.inputs())
    assert seen == [rows]


def refused(ours: Wan, **changes) -> str:
    with pytest.raises(ValueError) as caught:
        ours(**inputs() | changes)
    return str(caught.value)


def test_refusals():
    ours = model()
    image = {"encoder_hidden_states_image": normal(2, 7, 28)}
    assert "no embedding of image tokens, got some" in refused(ours, **image)
    assert "must be [B], [B, 3] or [B, 45]" in refused(ours, timestep=torch.ones(2, 4))
    assert "beside index" in refused(ours, timestep=torch.ones(2, 3), index=torch.zeros(2, 45).long())
    assert "must divide the size, got (3, 5, 10)" in refused(ours, hidden_states=normal(2, 4, 3, 5, 10))
    assert "context must be given" in refused(ours, encoder_hidden_states=None)
    with pytest.raises(ValueError, match="an embedding of image tokens, got none"):
        model(**IMAGE)(**inputs(channels=9))
