import pytest
import torch

from rfkernels.models.blocks import attend, rope_table, rotate, sinusoid


def test_attention_is_the_same_with_and_without_gradients():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 10, 64).unbind(0)
    bias = torch.zeros(2, 1, 1, 10)
    bias[1, ..., 7:] = float("-inf")
    trained = attend(q, k, v, bias)
    with torch.no_grad():
        sampled = attend(q, k, v, bias)
    torch.testing.assert_close(trained, sampled)
    v2 = v.clone()
    v2[1, :, 7:] = 100.0  # what the mask hides
    torch.testing.assert_close(attend(q, k, v2, bias), trained)


def test_rotation_keeps_length_and_sees_offsets_only():
    cos, sin = rope_table(4, 64)
    assert cos.shape == sin.shape == (16, 32)
    torch.manual_seed(0)
    q, k = torch.randn(2, 64).double().unbind(0)
    turned_q = rotate(q.expand(16, 64), cos, sin).view(4, 4, 64)
    turned_k = rotate(k.expand(16, 64), cos, sin).view(4, 4, 64)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(4, 4), rtol=1e-6, atol=0)
    products = torch.einsum("ijd,kld->ijkl", turned_q, turned_k)
    torch.testing.assert_close(products[0, 0, 2, 1], products[1, 2, 3, 3], rtol=1e-5, atol=1e-5)
    assert abs(products[0, 0, 2, 1] - products[0, 0, 1, 2]) > 1e-3  # rows and columns are told apart


@pytest.mark.parametrize("width", [64, 256])
def test_sinusoid_tells_noise_levels_apart(width):
    table = sinusoid(torch.tensor([0.0, 0.001, 0.5, 1.0]), width)
    assert table.shape == (4, width) and table.dtype == torch.float32
    assert torch.cdist(table, table).add(torch.eye(4) * 9).min() > 0.5
