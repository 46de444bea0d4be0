"""What HiDream has beside diffusers' model: kept captions, one row of padding, experts; what it refuses."""

import pytest
import torch
from torch import Tensor

from rfkernels.models import hidream
from rfkernels.models.hidream import HiDream, MixtureOfExperts
from tests.models.cases.hidream import CONFIG, inputs
from tests.models.parity import error, normal

TEXTS = ("encoder_hidden_states_t5", "encoder_hidden_states_llama3")


def model(**config) -> HiDream:
    torch.manual_seed(0)
    return HiDream(**CONFIG | config).eval().requires_grad_(False)


@torch.no_grad()
def test_captions_and_rotation_are_kept():
    ours, given = model(), inputs(size=(6, 14))
    expected = ours(**given)
    texts = [given.pop(name) for name in TEXTS]
    kept = {"captions": ours.captions(*texts), "rotation": ours.rotation(given["hidden_states"])}
    for _ in range(2):  # a step leaves them as they are
        assert torch.equal(ours(**given, **kept), expected)


def test_recording_gradients_changes_nothing():
    ours, given = model(), inputs()
    with torch.no_grad():
        expected = ours(**given)
    assert torch.equal(ours(**given), expected)


@torch.no_grad()
def test_pads_are_one_row(monkeypatch):
    """And they matter: a model that leaves them out is another."""
    ours, given, seen = model(), inputs(size=(6, 14)), []
    ours.x_embedder.proj.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    expected = ours(**given)
    monkeypatch.setattr(hidream, "_pad", lambda *_: (None, None))
    assert seen == [22] and error(ours(**given), expected) > 1e-3


def experts_one_by_one(ff: MixtureOfExperts, x: Tensor) -> Tensor:
    swiglu = lambda x, m: m.w2(torch.nn.functional.silu(m.w1(x)) * m.w3(x))
    rows = []
    for row in x.flatten(0, 1):
        p = (ff.gate.weight @ row).softmax(0)
        chosen = sorted(range(len(p)), key=lambda e: -p[e].item())[: ff.gate.top_k]
        rows.append(sum(p[e] * swiglu(row, ff.experts[e]) for e in chosen) + swiglu(row, ff.shared_experts))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (5, 1), (3, 3)])
def test_mixture_of_experts_and_its_gradients(experts, top_k):
    torch.manual_seed(0)
    ff, x = MixtureOfExperts(24, experts, top_k).double(), torch.randn(2, 9, 24).double().requires_grad_()
    leaves = [x, *ff.parameters()]
    found, expected = ff(x), experts_one_by_one(ff, x)
    assert error(found.detach(), expected.detach()) <= 1e-12
    wanted = torch.randn_like(found)
    grads = [torch.autograd.grad(y, leaves, wanted, materialize_grads=True) for y in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def refused(ours: HiDream, **changes) -> str:
    with pytest.raises(ValueError) as caught:
        ours(**inputs() | changes)
    return str(caught.value)


def test_refusals():
    ours = model()
    assert "at most 64 tokens" in refused(ours, hidden_states=normal(2, 4, 16, 18))
    assert "multiples of 2, got 5 x 6" in refused(ours, hidden_states=normal(2, 4, 5, 6))
    assert "both texts, must be given" in refused(ours, encoder_hidden_states_t5=None)
    assert "must be given" in refused(ours, pooled_embeds=None)
    with pytest.raises(ValueError, match="must add up to 24, and llama_layers name one for each of 5 blocks"):
        model(llama_layers=[0, 1])
