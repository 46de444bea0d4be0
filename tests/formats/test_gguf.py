"""GGUF: every block type to the bits of the gguf package, and files that it writes."""

import numpy as np
import pytest
import torch
from torch import nn

from rfkernels.formats import load, read
from rfkernels.formats.gguf import TYPES, read_header
from rfkernels.nn import QuantLinear

gguf = pytest.importorskip("gguf")
BLOCKS = [kind for kind, t in TYPES.items() if t.numbers > 1]


def blocks(kind, count, seed=0):
    """Random blocks whose 16-bit scales are small numbers."""
    known = TYPES[kind]
    raw = np.random.default_rng(seed).integers(0, 256, (count, known.bytes), dtype=np.uint8)
    halves = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}
    halves |= {"Q4_K": (0, 2), "Q5_K": (0, 2)}
    for at in halves.get(known.name, (0,)):
        raw[:, at + 1] = raw[:, at + 1] & 0x83 | 0x28
    return raw


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda k: TYPES[k].name)
def test_block_types_have_the_bits_of_the_package(kind):
    known = TYPES[kind]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == (known.numbers, known.bytes)
    assert gguf.GGMLQuantizationType(kind).name == known.name
    raw = blocks(kind, 50)
    theirs = gguf.dequantize(raw, gguf.GGMLQuantizationType(kind))
    ours = known.decode(torch.from_numpy(raw.copy()))
    assert ours.shape == (50, known.numbers) and np.isfinite(theirs).all()
    assert np.array_equal(
        ours.numpy().view(np.uint32), theirs.reshape(50, -1).astype(np.float32).view(np.uint32)
    )


def test_scales_of_six_bits_by_their_formula():
    packed = np.random.default_rng(1).integers(0, 256, 12, dtype=np.uint8)
    block = np.concatenate(
        [np.array([1, 1], np.float16).view(np.uint8), packed, np.full(128, 0x11, np.uint8)]
    )
    numbers = TYPES[12].decode(torch.from_numpy(block[None])).view(8, 32)[:, 0]
    b = packed.astype(int)
    for g in range(8):
        s = b[g] & 63 if g < 4 else (b[g + 4] & 15) | (b[g - 4] >> 6) << 4
        m = b[g + 4] & 63 if g < 4 else (b[g + 4] >> 4) | (b[g] >> 6) << 4
        assert numbers[g] == s - m


def write(path, tensors, values=()):
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_array("a.list.of.words", ["one", "two"])
    writer.add_array("some.numbers", [3, 4])
    writer.add_float64("a.float", 0.5)
    for name, value in values:
        writer.add_array(name, value)
    for name, array, kind in tensors:
        kind = gguf.GGMLQuantizationType[kind]
        if kind.name not in ("F32", "F16"):
            array = gguf.quantize(array, kind)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tmp_path):
    rng = np.random.default_rng(0)
    randn = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    tensors = [
        ("model.diffusion_model.0.weight", randn(64, 96), "Q4_0"),
        ("model.diffusion_model.0.bias", randn(64), "F32"),
        ("model.diffusion_model.2.weight", randn(32, 64), "Q8_0"),
        ("model.diffusion_model.2.bias", randn(32).astype(np.float16), "F16"),
        ("model.diffusion_model.3.weight", randn(8, 32), "BF16"),
        ("model.diffusion_model.4.weight", randn(8, 32), "Q5_1"),
    ]
    path = tmp_path / "small.gguf"
    write(path, tensors, [("comfy.gguf.orig_shape.model.diffusion_model.4.weight", [16, 4, 4])])
    return path, {name.removeprefix("model.diffusion_model."): array for name, array, _ in tensors}


def test_files(file):
    path, written = file
    header = read_header(path)
    assert header.values["general.architecture"] == "flux" and header.values["a.float"] == 0.5
    assert header.values["a.list.of.words"] == ["one", "two"] and header.values["some.numbers"] == [3, 4]
    items = dict(read(path))
    assert list(items) == ["0", "2.weight", "2.bias", "3.weight", "4.weight"]
    layer = items["0"]
    assert isinstance(layer, QuantLinear) and (layer.format, layer.group) == ("w4a16", 32)
    theirs = {t.name.removeprefix("model.diffusion_model."): t for t in gguf.GGUFReader(path).tensors}
    assert np.array_equal(
        layer.dequantized().numpy(), gguf.dequantize(theirs["0.weight"].data, theirs["0.weight"].tensor_type)
    )
    assert np.array_equal(layer.bias.numpy(), written["0.bias"])
    q8 = gguf.dequantize(theirs["2.weight"].data, theirs["2.weight"].tensor_type)
    assert np.array_equal(items["2.weight"].numpy(), q8)
    assert items["2.bias"].dtype == torch.float16 and items["3.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(items["3.weight"], torch.from_numpy(written["3.weight"]).bfloat16())
    assert items["4.weight"].shape == (16, 4, 4)


def test_a_model_requantised_on_the_way_in(file, tmp_path):
    _, written = file
    write(
        tmp_path / "two.gguf",
        [
            (n, a, k)
            for (n, a), k in zip(list(written.items())[:4], ("Q4_0", "F32", "Q8_0", "F16"), strict=True)
        ],
    )
    x = torch.randn(5, 96)
    w = lambda name: torch.from_numpy(written[name]).float()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32))
    load(model, tmp_path / "two.gguf", method="int8-convrot")
    assert [model[0].format, model[2].format] == ["w4a16", "int8-convrot"]
    expected = (x @ w("0.weight").T + w("0.bias")).relu() @ w("2.weight").T + w("2.bias")
    assert (model(x) - expected).norm() < 0.15 * expected.norm()
    plain = load(nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32)), tmp_path / "two.gguf")
    assert isinstance(plain[2], nn.Linear) and (plain(x) - expected).norm() < 0.15 * expected.norm()


def test_refusals(file, tmp_path):
    path, _ = file
    data = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(data[:-40])
    with pytest.raises(ValueError, match=r"4.weight ends at \d+, the file at \d+ bytes"):
        list(read(cut))
    cut.write_bytes(data[:60])
    with pytest.raises(ValueError, match="the file ends at 60 bytes, within its header"):
        list(read(cut))
    cut.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + data[8:])
    with pytest.raises(ValueError, match="GGUF of version 2 or 3 is required, got 9"):
        list(read(cut))
    writer = gguf.GGUFWriter(cut, "flux")
    writer.add_tensor("w", np.zeros((1, 54), np.uint8), raw_dtype=gguf.GGMLQuantizationType.TQ1_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"w must be of F32, F16, .*, got type 34"):
        list(read(cut))
