"""nunchaku's order, by the offset of every element, and what its layers compute."""

import pytest
import torch
from torch import nn

from rfkernels.formats import nunchaku, read
from rfkernels.formats.container import Checkpoint
from rfkernels.nn import QuantLinear
from rfkernels.ops.linear import unpack_int4
from rfkernels.quantization import quantize_int4

OUT, IN, RANK = 384, 256, 32


# --- offsets, by element ---


def qweight_nibble(n, k):
    word = (
        ((((n // 128) * (IN // 64) + k // 64) * 8 + (n // 16) % 8) * 8 + n % 8) * 16
        + ((k // 8) % 4) * 4
        + ((n // 8) % 2) * 2
        + (k // 32) % 2
    )
    return 8 * word + k % 8


def vector_at(n):
    return (n // 128) * 128 + ((n // 16) % 8) * 16 + ((n // 2) % 4) * 4 + ((n // 8) % 2) * 2 + n % 2


def scale_at(n, g, groups):
    return ((n // 128) * groups + g) * 128 + vector_at(n % 128)


def fp4_scale_at(n, g, groups):
    tile = ((n // 128) * (groups // 4) + g // 4) * 512
    return tile + (n % 8) * 64 + ((n // 8) % 4) * 16 + ((n // 32) % 4) * 4 + g % 4


def down_at(j, k):
    tile = ((k // 16) * (RANK // 16) + j // 16) * 8 + j % 8
    return tile * 32 + ((k // 2) % 4) * 8 + ((j // 8) % 2) * 4 + ((k // 8) % 2) * 2 + k % 2


def up_at(n, j):
    tile = ((n // 16) * (RANK // 16) + j // 16) * 8 + n % 8
    return tile * 32 + ((j // 2) % 4) * 8 + ((n // 8) % 2) * 4 + ((j // 8) % 2) * 2 + j % 2


def awq_nibble(n, k):
    word = (n // 4) * IN + ((k // 64) * 4 + n % 4) * 16 + ((k // 32) % 2) * 8 + k % 8
    return 4 * word + (k % 32) // 8


@pytest.mark.parametrize(
    "layout, at, rows, columns",
    [
        (nunchaku.QWEIGHT, qweight_nibble, OUT, IN),
        (nunchaku.SCALES, lambda n, g: scale_at(n, g, IN // 64), OUT, IN // 64),
        (nunchaku.SCALES, lambda n, g: vector_at(n), OUT, 1),
        (nunchaku.SCALES_FP4, lambda n, g: fp4_scale_at(n, g, IN // 16), OUT, IN // 16),
        (nunchaku.DOWN, down_at, RANK, IN),
        (nunchaku.UP, up_at, OUT, RANK),
        (nunchaku.AWQ, awq_nibble, OUT, IN),
    ],
)
def test_order(layout, at, rows, columns):
    matrix = torch.arange(rows * columns).view(rows, columns)
    offsets = at(torch.arange(rows)[:, None], torch.arange(columns)[None]).expand(rows, columns)
    expected = torch.empty(rows * columns, dtype=torch.long)
    expected[offsets.flatten()] = matrix.flatten()
    assert torch.equal(offsets.flatten().sort()[0], torch.arange(rows * columns))
    assert torch.equal(layout.pack(matrix), expected)
    assert torch.equal(layout.unpack(expected, rows, columns), matrix)


# --- layers ---


def svdq(bias=True):
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT, bias=bias).bfloat16()
    return QuantLinear.from_linear(linear, "svdq-int4", rank=RANK)


def same(a, b):
    assert a.config() == b.config()
    for name, tensor in a.state_dict().items():
        other = b.state_dict()[name]
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name


@pytest.mark.parametrize("names", ["new", "old"])
@pytest.mark.parametrize("bias", [True, False])
def test_svdq_round_trip(bias, names):
    layer = svdq(bias)
    parts = nunchaku.tensors(layer)
    assert parts["qweight"].dtype == torch.int8 and parts["qweight"].shape == (OUT, IN // 2)
    assert parts["wscales"].shape == (IN // 64, OUT) and parts["wscales"].dtype == torch.bfloat16
    assert parts["proj_down"].shape == (IN, RANK) and parts["proj_up"].shape == (OUT, RANK)
    old = {v: k for k, v in nunchaku._NEW.items()} if names == "old" else {}
    file = {f"blocks.0.qkv_proj.{old.get(k, k)}": v for k, v in parts.items()} | {"x.weight": torch.ones(3)}
    items = dict(read(file))
    assert list(items) == ["blocks.0.qkv_proj", "x.weight"]
    same(items["blocks.0.qkv_proj"], layer)


def test_codes_are_twos_complement():
    layer = svdq()
    nibbles = unpack_int4(nunchaku.tensors(layer)["qweight"].view(torch.uint8)).flatten()
    codes = unpack_int4(layer.weight)
    for n, k in ((0, 0), (5, 9), (130, 200), (383, 255)):
        signed = (nibbles[qweight_nibble(n, k)].item() + 8) % 16 - 8
        assert signed == codes[n, k].item() - 8


def test_layers_behind_gelu_have_their_shift_taken_out():
    layer = svdq()
    c = nunchaku.SHIFT
    parts = nunchaku.tensors(layer, shift=c)
    residual = layer.dequantized() - layer.proj_up.float() @ layer.proj_down.float()  # R / λ
    stored = nunchaku._vector(parts["bias"]).float()
    torch.testing.assert_close(stored, layer.bias.float() - c * residual.sum(1), atol=2e-2, rtol=0)
    items = dict(read({f"{n}.{k}": v for n in ("a.mlp_fc2", "a.mlp_fc1") for k, v in parts.items()}))
    back, kept = items["a.mlp_fc2"].bias.float(), items["a.mlp_fc1"].bias.float()
    torch.testing.assert_close(back, layer.bias.float(), atol=2e-2, rtol=0)
    assert torch.equal(kept, stored) and (kept - back).abs().max() > 0.1
    x = torch.nn.functional.gelu(torch.randn(6, IN)).double()  # as nunchaku runs it, without rounding tokens
    branch = x @ layer.proj_down.double().T @ layer.proj_up.double().T
    theirs = (x + c) @ residual.double().T + branch + kept.double()
    ours = x @ items["a.mlp_fc2"].dequantized().double().T + back.double()
    torch.testing.assert_close(theirs, ours, atol=2e-2, rtol=0)


@pytest.mark.parametrize("chunks", [6, 3, 1])
def test_awq_rows_and_ones(chunks):
    """nunchaku: rows [width, chunk], 1 in the bias of scales; diffusers: rows [chunk, width], no 1."""
    torch.manual_seed(0)
    out = chunks * IN if chunks > 1 else 128
    linear = nn.Linear(IN, out).bfloat16()
    layer = QuantLinear.from_linear(linear, "w4a16", group=64, zero="float")
    parts = nunchaku.tensors(layer)
    assert parts["qweight"].shape == (out // 4, IN // 2) and parts["qweight"].dtype == torch.int32
    assert parts["wscales"].shape == parts["wzeros"].shape == (IN // 64, out)
    nibbles = unpack_int4(parts["qweight"].view(torch.uint8)).flatten()
    codes, width = unpack_int4(layer.weight), out // chunks
    for n, k in ((0, 0), (6, 77), (out - 1, IN - 1)):
        natural = (n % chunks) * width + n // chunks
        assert nibbles[awq_nibble(n, k)] == codes[natural, k]
        weight = nibbles[awq_nibble(n, k)].float() * parts["wscales"][k // 64, n].float()
        weight += parts["wzeros"][k // 64, n].float()
        assert weight.item() == pytest.approx(layer.dequantized()[natural, k].item(), abs=2e-3)
        one = {6: (1, 4), 3: (1,), 1: ()}[chunks]
        expected = layer.bias[natural] + (1 if n % chunks in one else 0)
        assert parts["bias"][n].item() == expected.item()
    back = dict(read({f"norm1.linear.{k}": v for k, v in parts.items()} | svdq_parts()))["norm1.linear"]
    torch.testing.assert_close(back.dequantized(), layer.dequantized(), atol=2e-3, rtol=0)
    torch.testing.assert_close(back.bias, layer.bias, atol=4e-3, rtol=0)
    assert torch.equal(back.weight, layer.weight)


def svdq_parts():
    return {f"other.{k}": v for k, v in nunchaku.tensors(svdq()).items()}


def test_nvfp4_layers_are_decoded():
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (OUT, IN), generator=g, dtype=torch.uint8)
    scale = (torch.rand(OUT, IN // 16, generator=g) + 0.5).to(torch.float8_e4m3fn)
    columns = torch.rand(OUT, generator=g) + 0.5
    layer = svdq()
    parts = {k: v for k, v in nunchaku.tensors(layer).items() if k not in ("qweight", "wscales")}
    from rfkernels.ops.linear import pack_int4

    parts["qweight"] = pack_int4(nunchaku.QWEIGHT.pack(codes)).view(torch.int8).view(OUT, IN // 2)
    packed = nunchaku.SCALES_FP4.pack(scale.view(torch.uint8))
    parts["wscales"] = packed.view(torch.float8_e4m3fn).view(IN // 16, OUT)
    parts["wcscales"] = nunchaku.SCALES.pack(columns[:, None])
    parts["wtscale"] = torch.tensor(0.25)
    items = dict(read({f"l.{k}": v for k, v in parts.items()}))
    value = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    numbers = torch.tensor([*value, *(-v for v in value)])[codes.long()]
    residual = numbers * scale.float().repeat_interleave(16, 1) * columns[:, None] * 0.25
    expected = residual / layer.smooth.float() + layer.proj_up.float() @ layer.proj_down.float()
    torch.testing.assert_close(items["l.weight"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(items["l.bias"], layer.bias.detach())


def test_write_and_refusals(tmp_path):
    model = nn.Sequential(svdq(), nn.LayerNorm(OUT))
    nunchaku.write(model, tmp_path / "a.safetensors")
    items = dict(read(tmp_path / "a.safetensors"))
    same(items["0"], model[0])
    assert torch.equal(items["1.weight"], model[1].weight)
    small = QuantLinear.from_linear(nn.Linear(128, 100), "svdq-int4")
    with pytest.raises(
        ValueError, match=r"0: nunchaku: multiples of 128 rows and 64 columns .*, got 100 x 128"
    ):
        nunchaku.write(nn.Sequential(small), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="svdq-int4 or w4a16 in groups of 64 is required, got int8"):
        nunchaku.tensors(QuantLinear.from_linear(nn.Linear(128, 128), "int8"))
    codes, scale, zero = quantize_int4(torch.randn(128, 128), 64, "integer")
    with pytest.raises(ValueError, match="floating zeros, or none, are required"):
        nunchaku.tensors(QuantLinear("w4a16", codes, scale, zero))
    parts = svdq_parts() | {"other.extra": torch.ones(1)}
    with pytest.raises(ValueError, match=r"nunchaku: other must have of .* got .*'extra'"):
        list(nunchaku.read(Checkpoint(parts), torch.bfloat16))
