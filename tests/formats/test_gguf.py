"""GGUF: every block type to the bits of the gguf package, and files that it writes."""

import copy
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bench.gguf_blocks import random_blocks
from rfkernels import ops
from rfkernels.formats import Part, load, read
from rfkernels.formats.gguf import TYPES, read_header
from rfkernels.formats.native import load_quantized, save_quantized
from rfkernels.nn import QuantLinear
from rfkernels.ops.gguf import block_of

gguf = pytest.importorskip("gguf")


def theirs(blocks, kind):
    """The numbers of blocks by the package."""
    return torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])).float()


@pytest.mark.parametrize("kind", ops.GGUF_KINDS)
def test_block_types_have_the_bits_of_the_package(kind):
    (number,) = [n for n, name in TYPES.items() if name == kind]
    assert gguf.GGMLQuantizationType(number).name == kind
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == block_of(kind)[:2]
    blocks = random_blocks(kind, 50, 256)
    for ours in (
        ops.dequantize_gguf(blocks, kind),
        ops.dequantize_gguf_reference(blocks, kind, torch.float32),
    ):
        assert ours.shape == (50, 256) and ours.isfinite().all()
        assert torch.equal(ours.view(torch.int32), theirs(blocks, kind).view(torch.int32))


def test_scales_of_six_bits_by_their_formula():
    packed = np.random.default_rng(1).integers(0, 256, 12, dtype=np.uint8)
    block = np.concatenate(
        [np.array([1, 1], np.float16).view(np.uint8), packed, np.full(128, 0x11, np.uint8)]
    )
    numbers = ops.dequantize_gguf(torch.from_numpy(block[None]), "Q4_K").view(8, 32)[:, 0]
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
    assert list(items) == ["0", "2", "3.weight", "4.weight"]
    known = {t.name.removeprefix("model.diffusion_model."): t for t in gguf.GGUFReader(path).tensors}
    for name, kind in (("0", "Q4_0"), ("2", "Q8_0")):
        layer, stored = items[name], known[f"{name}.weight"]
        assert isinstance(layer, QuantLinear) and (layer.format, layer.kind) == ("gguf", kind)
        assert np.array_equal(layer.weight.numpy(), stored.data)
        assert torch.equal(layer.dequantized(), theirs(torch.from_numpy(stored.data.copy()), kind))
        assert np.array_equal(layer.bias.numpy(), written[f"{name}.bias"])
    assert items["3.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(items["3.weight"], torch.from_numpy(written["3.weight"]).bfloat16())
    assert items["4.weight"].shape == (16, 4, 4) and items["4.weight"].dtype == torch.float32


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_blocks_are_the_mapping_of_the_file(file):
    path, _ = file
    path.chmod(0o444)
    model = nn.Sequential(nn.Linear(96, 64), nn.Identity(), nn.Linear(64, 32))
    whole = ("3.weight", "4.weight")
    for name, layer in read(path):
        if name not in whole:
            setattr(model, name, layer)
    weight, inode = model[0].weight, str(os.stat(path).st_ino)
    lines = [
        line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.split()[4] == inode
    ]
    spans = [[int(x, 16) for x in line[0].split("-")] for line in lines]
    inside = lambda t: any(a <= t.data_ptr() and t.data_ptr() + t.nbytes <= b for a, b in spans)
    assert inside(weight) and inside(model[2].weight) and not inside(model[0].bias)
    assert weight.untyped_storage().nbytes() == weight.nbytes  # what a save or a copy would take
    part = model[0].take_rows(slice(16, 48))
    assert inside(part.weight) and torch.equal(part.dequantized(), model[0].dequantized()[16:48])
    header = read_header(path).tensors["model.diffusion_model.0.weight"]
    before = path.read_bytes()
    weight.zero_()  # a copy of the page alone
    assert path.read_bytes() == before and any(before[header[2] : header[2] + weight.nbytes])


@pytest.fixture
def two(file, tmp_path):
    """A file of two layers, what is in it, and a model of the same."""
    _, written = file
    kinds = ("Q4_0", "F32", "Q8_0", "F16")
    path = tmp_path / "two.gguf"
    write(path, [(n, a, k) for (n, a), k in zip(list(written.items())[:4], kinds, strict=True)])
    return path, written, nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32))


def product(written, x):
    w = lambda name: torch.from_numpy(written[name]).float()
    return (x @ w("0.weight").T + w("0.bias")).relu() @ w("2.weight").T + w("2.bias")


def test_a_model_on_blocks(two, tmp_path):
    path, written, model = two
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    load(model, path)
    assert [(model[i].format, model[i].kind, model[i].dtype) for i in (0, 2)] == [
        ("gguf", "Q4_0", torch.float32),
        ("gguf", "Q8_0", torch.float32),
    ]
    y, expected = model(x), product(written, x)
    assert (y - expected).norm() < 0.1 * expected.norm()
    numbers = nn.functional.linear(x, model[0].dequantized(), model[0].bias).relu()
    numbers = nn.functional.linear(numbers, model[2].dequantized(), model[2].bias.float())
    assert (y - numbers).norm() < 1e-5 * numbers.norm()
    save_quantized(model, tmp_path / "native.safetensors")
    again = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32))
    load_quantized(again, tmp_path / "native.safetensors")
    assert again[0].config() == model[0].config() and torch.equal(again(x), y)
    assert torch.equal(model.bfloat16()[0].weight, again[0].weight)  # casts leave blocks alone


@pytest.mark.parametrize("kind", ["Q5_0", "Q4_K"])
def test_a_layer_on_blocks_as_a_module_of_torch(kind):
    blocks, x = random_blocks(kind, 24, 256), torch.randn(7, 256, generator=torch.Generator().manual_seed(0))
    layer = QuantLinear("gguf", blocks, bias=torch.ones(24), kind=kind)
    assert (layer.in_features, layer.out_features, layer.group) == (256, 24, 0) and kind in repr(layer)
    column, up = torch.linspace(0.5, 2, 24), torch.ones(24, 2)
    y = layer.run(x, lora=(x[:, :2].contiguous(), up), column_scale=column, activation="relu")
    true = x @ (layer.dequantized() * column[:, None]).T + x[:, :2] @ up.T + 1
    assert (y - true.relu()).norm() < 1e-5 * true.norm()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.with_bias(layer.bias)):
        assert other.config() == layer.config() and torch.equal(other(x), layer(x))
    rows = torch.tensor([5, 0, 23])
    assert (layer.take_rows(rows)(x) - layer(x)[:, rows]).norm() < 1e-5 * layer(x).norm()


def test_rows_of_blocks_go_to_several_layers(two):
    path, _, _ = two
    model = nn.ModuleDict({n: nn.Linear(96, 32) for n in "qk"} | {"o": nn.Linear(64, 32)})

    def rename(name):
        layer, _, leaf = name.partition(".")
        if layer == "2":
            return f"o.{leaf}"
        return [Part(f"q.{leaf}", 0, 32), Part(f"k.{leaf}", 32, 64, swap=True)]

    load(model, path, rename=rename)
    layers = dict(read(path))
    assert torch.equal(model["q"].weight, layers["0"].weight[:32])
    assert torch.equal(model["k"].weight, layers["0"].weight[32:].roll(16, 0))
    assert torch.equal(model["k"].bias, layers["0"].bias[32:].roll(16))
    assert model["q"].kind == model["k"].kind == "Q4_0"


def test_a_model_requantised_on_the_way_in(two):
    path, written, _ = two
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32))
    load(model, path, method="int8")
    assert [model[0].format, model[2].format] == ["int8", "int8"]
    expected = product(written, x)
    assert (model(x) - expected).norm() < 0.15 * expected.norm()


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


BLOCKS = torch.zeros(4, 36, dtype=torch.uint8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "kind must be given for gguf, and only there, got None"),
        ({"kind": "Q4_Z"}, "kind must be one of Q4_0, .*, got 'Q4_Z'"),
        ({"kind": "Q4_K"}, r"weight must be Q4_K, \[out, a multiple of 144\], got torch.uint8 \[4, 36\]"),
        ({"kind": "Q4_0", "weight_scale": torch.ones(4)}, "weight_scale must be absent"),
        ({"kind": "Q4_0", "bias": torch.ones(5)}, r"bias must be \[4\]"),
        ({"kind": "Q4_0", "rotation": 16}, "rotation must be 0"),
    ],
)
def test_layers_refuse_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantLinear("gguf", BLOCKS, **arguments)
    with pytest.raises(ValueError, match="kind must be given for gguf, and only there"):
        QuantLinear("int8", torch.zeros(4, 8, dtype=torch.int8), torch.ones(4), kind="Q4_0")
