"""What `rfkernels.ops.guidance` promises beyond the claims of every op."""

import torch

from rfkernels.ops import affine_step, cfg_step
from tests.ops.cases import every_device

# CFG, then Euler, w = 4: computed once in numpy.
GOLDEN_CFG_EULER = [
    *[0.744822868, 0.927518812, 0.262113726, -0.596996415],
    *[-0.846047230, -0.280664796, 0.524561687, 0.766875023],
]


def golden():
    """Inputs of the golden vectors: eight numbers, sigma .6 -> .45."""
    i = torch.arange(8, dtype=torch.float64)
    return torch.sin(i + 1), torch.cos(0.7 * i + 0.3), torch.cos(0.7 * i + 0.5) + 0.1 * i / 8


@every_device
def test_cfg_step_matches_the_golden_vector(device):
    x, uncond, cond = (t.to(device) for t in golden())
    expected = x + (0.45 - 0.6) * (uncond + 4.0 * (cond - uncond))
    stepped = cfg_step(x, uncond, cond, 4.0, 1.0, 0.45 - 0.6)
    torch.testing.assert_close(stepped, expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(
        stepped.cpu(), torch.tensor(GOLDEN_CFG_EULER, dtype=torch.float64), rtol=0, atol=1e-9
    )


@every_device
def test_guidance_one_is_the_conditional_step_and_zero_the_unconditional(device):
    x, uncond, cond = torch.randn(3, 4, 5, dtype=torch.float64, device=device)
    torch.testing.assert_close(cfg_step(x, uncond, cond, 1.0, 1.0, -0.1), affine_step(x, cond, 1.0, -0.1))
    assert torch.equal(cfg_step(x, uncond, cond, 0.0, 1.0, -0.1), affine_step(x, uncond, 1.0, -0.1))


@every_device
def test_each_sample_has_its_own_guidance(device):
    x, uncond, cond = torch.randn(3, 4, 5, device=device)
    weights = torch.tensor([0.0, 1.0, 3.0, 7.5], device=device)
    together = cfg_step(x, uncond, cond, weights, 1.0, -0.1)
    for i, w in enumerate(weights.tolist()):
        alone = cfg_step(x[i : i + 1], uncond[i : i + 1], cond[i : i + 1], w, 1.0, -0.1)
        assert torch.equal(together[i : i + 1], alone)
