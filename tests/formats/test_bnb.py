"""bitsandbytes: what the package stores is what we read, and the formulas by themselves."""

import json

import pytest
import torch

from rfkernels.formats import read
from rfkernels.formats.bnb import decode_4bit

NF4 = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105, 0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1]


def test_nested_scales_by_their_formula():
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (640 * 64,), generator=g, dtype=torch.uint8)
    absmax = torch.randint(0, 256, (640,), generator=g, dtype=torch.uint8)
    quant_map, nested_map = torch.tensor(NF4), torch.rand(256, generator=g)
    nested = torch.rand(3, generator=g)
    parts = {
        "weight": (codes[0::2] << 4 | codes[1::2])[:, None],  # the even element in the high bits
        "weight.absmax": absmax,
        "weight.quant_map": quant_map,
        "weight.nested_absmax": nested,
        "weight.nested_quant_map": nested_map,
    }
    state = {"shape": [64, 640], "blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.25}
    found = decode_4bit(parts, state)
    assert found.shape == (64, 640)
    for n, k in ((0, 0), (0, 1), (13, 77), (63, 639), (40, 5)):
        at = n * 640 + k
        block = at // 64
        scale = nested_map[absmax[block].long()] * nested[block // 256] + 0.25
        assert found[n, k].item() == pytest.approx((quant_map[codes[at].long()] * scale).item(), rel=1e-6)


def test_int8():
    codes, top = torch.randint(-127, 128, (6, 32), dtype=torch.int8), torch.rand(6) + 0.5
    file = {"l.weight": codes, "l.SCB": top, "l.weight_format": torch.tensor(0, dtype=torch.uint8)}
    items = dict(read(file | {"norm.weight": torch.ones(3)}))
    assert items["l"].format == "int8" and torch.equal(items["norm.weight"], torch.ones(3))
    torch.testing.assert_close(items["l"].dequantized(), codes.float() * top[:, None] / 127)
    with pytest.raises(ValueError, match=r"l.weight_format must be 0 \(rows\)"):
        list(read(file | {"l.weight_format": torch.tensor(2, dtype=torch.uint8)}))
    with pytest.raises(ValueError, match=r"bnb: l must have of .* got also \['CB'\]"):
        list(read(file | {"l.CB": top}))


@pytest.fixture(scope="module")
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_of_the_package(kind, nested, bitsandbytes):
    functional = bitsandbytes.functional
    w = torch.randn(64, 320, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(w, blocksize=64, compress_statistics=nested, quant_type=kind)
    theirs = functional.dequantize_4bit(packed, state)
    file = {"l.weight": packed, "l.bias": torch.ones(64)}
    file |= {f"l.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    items = dict(read(file))
    torch.testing.assert_close(items["l.weight"], theirs, atol=1e-6, rtol=1e-5)
    assert torch.equal(items["l.bias"], torch.ones(64))
    assert any(k.endswith(f"bitsandbytes__{kind}") for k in file)


@pytest.mark.filterwarnings("ignore")
def test_int8_of_the_package(bitsandbytes):
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).half()
    codes, top, _ = bitsandbytes.functional.int8_vectorwise_quant(w)
    found = dict(read({"l.weight": codes, "l.SCB": top}))["l"]
    assert (found.dequantized() - w.float()).abs().max() <= top.max() / 127 * 0.51
    assert json.dumps(found.config())
