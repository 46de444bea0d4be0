import pytest
import torch

from rfkernels.train.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16), (3, 24, 40)])
def test_orthogonalised_singular_values_are_near_one(shape):
    torch.manual_seed(0)
    g = torch.randn(shape)
    u = orthogonalise(g).float()
    values = torch.linalg.svdvals(u)
    assert u.shape == g.shape and values.min() > 0.3 and values.max() < 1.4
    left, _, right = torch.linalg.svd(g, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(u.flatten(), (left @ right).flatten(), 0) > 0.95


def test_first_step_moves_by_the_orthogonalised_gradient():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(32, 8))
    before, p.grad = p.detach().clone(), torch.randn(32, 8)
    Muon([p], lr=0.1).step()
    expected = (
        before - 0.1 * 2 * orthogonalise(p.grad).float()
    )  # sqrt(32 / 8) = 2; scale of the gradient drops out
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=2e-2)


def test_a_linear_map_is_learned():
    torch.manual_seed(0)
    target, w = torch.randn(16, 16), torch.nn.Parameter(torch.zeros(16, 16))
    muon = Muon([w], lr=0.1)
    for step in range(200):
        muon.param_groups[0]["lr"] = 0.2 * (1 - step / 200)
        muon.zero_grad()
        (w - target).square().sum().backward()
        muon.step()
    assert (w - target).norm() < 0.15 * target.norm()
