import dataclasses

import pytest
import torch

from rfkernels import samplers
from rfkernels.evaluation import draw as drawing
from rfkernels.evaluation.draw import draw
from tests.tiny import CONFIG, tiny_model

PROMPTS = ["red heart", "blue circle", ""]


def test_draw_depends_on_its_seed_and_not_on_its_company(monkeypatch):
    model = tiny_model()
    together = draw(model, PROMPTS, seed=5, steps=2)
    monkeypatch.setattr(drawing, "CHUNK", 1)
    torch.testing.assert_close(draw(model, PROMPTS, seed=5, steps=2), together, rtol=1e-3, atol=1e-3)
    alone = draw(model, PROMPTS[1:2], seed=6, steps=2)
    torch.testing.assert_close(alone, together[1:2], rtol=1e-3, atol=1e-3)
    assert (draw(model, PROMPTS, seed=6, steps=2) - together).abs().max() > 0.1


def test_none_means_the_settings_of_the_model():
    own = dataclasses.replace(CONFIG, steps=3, guidance=2.0, shift=2.5, method="heun")
    model = tiny_model(config=own)
    given = {"steps": 3, "guidance": 2.0, "shift": 2.5, "method": "heun"}
    got = draw(model, PROMPTS, seed=1)
    assert torch.equal(got, draw(model, PROMPTS, seed=1, **given))
    for name, other in {"steps": 2, "guidance": 1.5, "shift": 1.0, "method": "euler"}.items():
        assert not torch.equal(got, draw(model, PROMPTS, seed=1, **{**given, name: other})), name


def test_guidance_one_is_the_prompt_alone_at_half_the_cost(monkeypatch):
    model, rows = tiny_model(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, *more: rows.append(len(x)) or forward(x, *more))
    one = draw(model, PROMPTS, seed=3, steps=2, guidance=1)
    assert rows == [3, 3]
    near = draw(model, PROMPTS, seed=3, steps=2, guidance=1 + 1e-6)
    assert rows[2:] == [6, 6]
    torch.testing.assert_close(one, near, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("chunk", [2, 32])
def test_path_is_the_trajectory(monkeypatch, chunk):
    monkeypatch.setattr(drawing, "CHUNK", chunk)
    path: list[torch.Tensor] = []
    end = draw(tiny_model(), PROMPTS, seed=2, steps=3, method="euler", path=path)
    assert len(path) == 4 and torch.equal(path[-1], end) and path[0].std() == pytest.approx(1, abs=0.1)
    twice = tiny_model().encode([""] * 3 + PROMPTS)
    sigmas = samplers.schedule("linear", 3).float()
    without, with_ = tiny_model().guided(path[1], sigmas[1:2].expand(3), twice)
    step = path[1] + (sigmas[2] - sigmas[1]) * (without + CONFIG.guidance * (with_ - without))
    torch.testing.assert_close(path[2], step, rtol=1e-3, atol=1e-3)
