"""NVFP4 and MXFP8: every code, both dialects, and cuBLAS's order of scales by its offsets."""

import json

import pytest
import torch

from rfkernels.formats import read
from rfkernels.formats.nvfp4 import blocked, decode_mxfp8, e2m1, unblocked

OUT, IN = 48, 96


def mark(**options):
    return torch.tensor(list(json.dumps(options).encode()), dtype=torch.uint8)


def test_e2m1():
    for code in range(16):
        exponent, mantissa = code >> 1 & 3, code & 1
        value = (mantissa / 2 + (exponent > 0)) * 2.0 ** (max(exponent, 1) - 1) * (-1) ** (code >> 3)
        assert e2m1(torch.tensor([code])).item() == value


@pytest.mark.parametrize("rows, columns", [(128, 4), (256, 12), (130, 5), (7, 1)])
def test_blocked_scales(rows, columns):
    scales = torch.arange(1, rows * columns + 1).view(rows, columns)
    stored = blocked(scales)
    a, b = -(-rows // 128), -(-columns // 4)
    assert stored.shape == (128 * a, 4 * b)
    flat = stored.flatten()
    for r in range(0, rows, 3):
        for c in range(columns):
            at = ((r // 128) * b + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4
            assert flat[at] == scales[r, c]
    assert torch.equal(unblocked(stored, rows, columns), scales)


def case():
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (OUT, IN), generator=g, dtype=torch.uint8)
    scale = (torch.rand(OUT, IN // 16, generator=g) + 0.5).to(torch.float8_e4m3fn)
    expected = e2m1(codes) * scale.float().repeat_interleave(16, 1) * 0.125
    return codes, scale, torch.tensor(0.125), expected


def test_low_nibble_first_with_linear_scales():
    codes, scale, number, expected = case()
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    file = {"l.weight": packed, "l.weight_scale": scale, "l.weight_scale_2": number}
    items = dict(
        read(file | {"l.input_scale": torch.ones(()), "l.bias": torch.ones(OUT), "x": torch.ones(1)})
    )
    torch.testing.assert_close(items["l.weight"], expected)
    assert set(items) == {"l.weight", "l.bias", "x"}
    swizzled = blocked(scale.view(torch.uint8)).view(torch.float8_e4m3fn)
    torch.testing.assert_close(dict(read(file | {"l.weight_scale": swizzled}))["l.weight"], expected)
    with pytest.raises(ValueError, match=r"nvfp4: l must have .* got also \['smooth'\]"):
        list(read(file | {"l.smooth": torch.ones(1)}))
    with pytest.raises(ValueError, match="blocked scales of 48 x 6 are 1024, got 96"):
        list(read(file | {"l.weight_scale": scale[:16]}))


def test_comfyui_has_the_high_nibble_first_and_blocked_scales():
    codes, scale, number, expected = case()
    file = {
        "l.weight": codes[:, 0::2] << 4 | codes[:, 1::2],
        "l.weight_scale": blocked(scale.view(torch.uint8)).view(torch.float8_e4m3fn),
        "l.weight_scale_2": number,
        "l.comfy_quant": mark(format="nvfp4"),
    }
    torch.testing.assert_close(dict(read(file))["l.weight"], expected)
    bias = torch.ones(OUT - 5)  # rows were padded to 16
    torch.testing.assert_close(dict(read(file | {"l.bias": bias}))["l.weight"], expected[:-5])


def test_mxfp8():
    g = torch.Generator().manual_seed(0)
    codes = torch.randn(OUT, IN, generator=g).to(torch.float8_e4m3fn)
    exponents = torch.randint(120, 135, (OUT, IN // 32), generator=g, dtype=torch.uint8)
    expected = codes.float() * 2.0 ** (exponents.float() - 127).repeat_interleave(32, 1)
    torch.testing.assert_close(decode_mxfp8(codes, blocked(exponents)), expected)
    file = {"l.weight": codes, "l.weight_scale": blocked(exponents), "l.comfy_quant": mark(format="mxfp8")}
    torch.testing.assert_close(dict(read(file))["l.weight"], expected)
