"""What the steps of `rfkernels.ops.solver` promise beyond the claims of every op."""

import pytest
import torch

from rfkernels.ops import affine_step, linear_combination, taylor_step
from tests.ops.cases import BF16, F32, F64, Make, every_device


@every_device
def test_affine_step_is_ddim_for_a_noise_prediction(device):
    # VP path .8, .6 -> .95: exact noise takes x to the same point of the path (specs 0.2, row eps).
    x0, noise = torch.randn(2, 4, 5, dtype=torch.float64, device=device)
    alpha, sigma, alpha2 = 0.8, 0.6, 0.95
    sigma2 = (1 - alpha2**2) ** 0.5
    stepped = affine_step(alpha * x0 + sigma * noise, noise, alpha2 / alpha, sigma2 - alpha2 * sigma / alpha)
    torch.testing.assert_close(stepped, alpha2 * x0 + sigma2 * noise)


@every_device
def test_affine_step_moves_every_frame_by_its_own_step(device):
    video = torch.zeros(2, 3, 4, 2, 2, device=device)
    steps = torch.arange(8.0, device=device).view(2, 1, 4)
    moved = affine_step(video, torch.ones_like(video), 1.0, steps)
    assert torch.equal(moved, steps.view(2, 1, 4, 1, 1).expand_as(video))


@every_device
def test_affine_step_rounds_ties_to_even(device):
    # 1 + 2^-8 and 1 + 2^-7 + 2^-8 lie halfway between two bfloat16 numbers.
    x = torch.tensor([[1.0, 1.0 + 2**-7]], dtype=torch.bfloat16, device=device)
    stepped = affine_step(x, torch.full_like(x, 2**-8), 1.0, 1.0)
    assert stepped.tolist() == [[1.0, 1.0 + 2**-6]]


@every_device
def test_linear_combination_keeps_small_steps_of_16_bit_velocities(device):
    # 1,000 steps of 2^-12 vanish in a bfloat16 state and add up in a float32 one.
    x, v = torch.ones(8, device=device), torch.ones(8, device=device, dtype=torch.bfloat16)
    for _ in range(1000):
        linear_combination([x, v], [1.0, 2.0**-12], out=x)
    assert x.tolist() == [1 + 1000 * 2**-12] * 8


@every_device
def test_linear_combination_takes_one_to_eight_tensors(device):
    tensors = [torch.full((3,), float(2**k), device=device) for k in range(9)]
    for k in range(1, 9):
        assert linear_combination(tensors[:k], [1.0] * k).tolist() == [2.0**k - 1] * 3
    for wrong in ([], tensors):
        with pytest.raises(ValueError, match=f"expected 1..8 tensors, got {len(wrong)}"):
            linear_combination(wrong, [1.0] * len(wrong))


def test_linear_combination_wants_one_coefficient_per_tensor():
    x = torch.zeros(3)
    for coefs in ([1.0], [1.0, 2.0, 3.0], torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"one coefficient per tensor, \[2, \*rows\], got f32\["):
            linear_combination([x, x], coefs)


@every_device
def test_taylor_step_is_exact_on_polynomials(device):
    # x(t) = t^3 - 2 t, from t = 1 by dt = 1/2: the three derivatives are 1, 6, 6.
    x = torch.tensor([[-1.0]], device=device)
    derivatives = torch.tensor([1.0, 6.0, 6.0], device=device).view(3, 1, 1)
    assert taylor_step(x, derivatives, 0.5).item() == 1.5**3 - 2 * 1.5


@pytest.mark.parametrize("order", [0, 5])
def test_taylor_step_refuses_other_orders(order):
    with pytest.raises(ValueError, match=r"order must be 1..4, got derivatives f32\["):
        taylor_step(torch.zeros(2, 5), torch.zeros(order, 2, 5), 0.5)


@every_device
def test_a_step_beyond_2_31_bytes_reaches_the_last_element(device):
    n = 2**28 + 5  # 1 GiB of float32 offsets, an odd tail
    x = torch.zeros(n, device=device)
    v = torch.ones((), dtype=torch.bfloat16, device=device).expand(n).contiguous()
    affine_step(x, v, 1.0, 0.5, out=x)
    assert x[0] == 0.5 and x[-1] == 0.5 and x.sum(dtype=torch.float64) == n / 2


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_large_result_may_start_anywhere(offset, dtype):
    # Larger than 4 MiB it is stored past the caches, by instructions that need 16-byte alignment; rows end
    # inside the strips that are stored at once.
    shape = (3, 1_000_003)
    make = Make(shape, dtype, dtype, "cpu")
    x, v, a, b = make.x, make.v, make.scalar, make.scalar
    out = torch.full((3 * 1_000_003 + offset,), torch.nan, dtype=dtype)[offset:].view(shape)
    affine_step(x, v, a, b, out=out)
    rows = [affine_step(*(t[i : i + 1].clone() for t in (x, v, a, b))) for i in range(3)]
    assert torch.equal(out, torch.cat(rows))
