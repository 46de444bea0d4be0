"""Plans from headers: the sizes and operations of known models, what fits, what is refused."""

import json

import pytest
import torch
from torch import nn

from rfkernels.memory import BOARDS, plan
from rfkernels.memory.boards import GIB, board
from rfkernels.memory.header import Entry, read_entries
from rfkernels.memory.plan import read_bytes
from rfkernels.memory.residency import device_bytes, streamed_layers
from rfkernels.memory.shape import FORMATS, Work, model_shape
from rfkernels.nn import QuantLinear
from rfkernels.quantization import FORMATS as QUANTISERS
from tests.memory import headers


def shape_of(shapes, dtype="BF16"):
    return model_shape([Entry(n, dtype, s, 2 * torch.Size(s).numel()) for n, s in shapes.items()])


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return headers.write_header(tmp_path_factory.mktemp("flux") / "flux1-dev.safetensors", headers.flux())


# parameters in 10^9, tokens, text, and operations in 10^12: all and of attention, of one pass
@pytest.mark.parametrize(
    "make, layers, width, params, tokens, text, total, attention",
    [
        (headers.flux, 57, 3072, 11.901, 4096, 512, 74.4, 14.9),
        (headers.flux_diffusers, 57, 3072, 11.901, 4096, 512, 74.4, 14.9),
        (headers.qwen, 60, 3072, 20.43, 4096, 256, 73.1, 14.0),
        (headers.qwen, 60, 3072, 20.43, 6889, 256, 134.8, 37.6),
        (headers.z_image, 34, 3840, 6.155, 4096, 128, 56.6, 8.7),
        (headers.sd35_medium, 24, 1536, 2.463, 4096, 333, 11.25, 4.23),
        (headers.hidream, 48, 2560, 17.08, 4096, 384, 77.8, 9.9),
        (headers.wan, 40, 5120, 14.288, 32760, 512, 1678, 893),
        (headers.wan, 40, 5120, 14.288, 75600, 512, 6523, 4714),
    ],
)
def test_known_models(make, layers, width, params, tokens, text, total, attention):
    shape = shape_of(make())
    assert (len(shape.layers), shape.width) == (layers, width)
    assert shape.nbytes() / 2e9 == pytest.approx(params, rel=1e-3)
    work = sum(shape.work(tokens, text, 1), Work())
    assert (work.linear + work.attention) / 1e12 == pytest.approx(total, rel=2e-3)
    assert work.attention / 1e12 == pytest.approx(attention, rel=6e-3)
    twice = sum(shape.work(tokens, text, 2), Work())
    assert twice.attention == 2 * work.attention and twice.linear == 2 * work.linear


@pytest.mark.parametrize(
    "names", [("cross_attn.k_img", "cross_attn.v_img"), ("attn2.add_k_proj", "attn2.add_v_proj")]
)
def test_keys_and_values_of_a_picture_are_cross_attention(names):
    shapes = headers.wan(2)
    plain = sum(shape_of(shapes).work(1000, 50, 1), Work())
    shapes |= {f"blocks.{i}.{name}.weight": (5120, 5120) for i in range(2) for name in names}
    work = sum(shape_of(shapes).work(1000, 50, 1), Work())
    assert work.linear - plain.linear == 2 * 2 * 2 * 5120**2 * 50 and work.attention == plain.attention


def test_layers_come_in_the_order_of_their_use():
    names = [layer.name for layer in shape_of(dict(sorted(headers.z_image().items()))).layers]
    refiners = [f"{name}_refiner.{i}" for name in ("context", "noise") for i in range(2)]
    assert names == refiners + [f"layers.{i}" for i in range(30)]
    by_name = dict(sorted(headers.flux_diffusers().items()))  # as files are often written
    names = [layer.name for layer in shape_of(by_name).layers]
    assert names[18:20] == ["transformer_blocks.18", "single_transformer_blocks.0"]


def test_prefixes_and_other_models_in_one_file():
    shapes = {f"model.diffusion_model.{n}": s for n, s in headers.flux(2, 2).items()}
    shapes["text_encoders.t5xxl.transformer.encoder.block.0.layer.0.weight"] = (4096, 4096)
    shape = shape_of(shapes)
    assert shape.layers[0].name == "double_blocks.0" and shape.other_models == 2 * 4096**2
    assert shape.nbytes() == shape_of(headers.flux(2, 2)).nbytes()


@pytest.mark.parametrize("format", QUANTISERS)
def test_bytes_of_formats_are_those_of_layers(format):
    linear = nn.Linear(256, 384, bias=False, dtype=torch.bfloat16)
    stored = QuantLinear.from_linear(linear, format).nbytes
    assert FORMATS[format](384, 256) == stored


def test_what_is_quantised():
    shape = shape_of(headers.flux(1, 2))
    single = shape.layers[-1]
    saved = single.nbytes() - single.nbytes("int8")
    assert saved == sum(2 * n - n - 4 * out for n, out in ((7 * 3072**2, 7 * 3072), (5 * 3072**2, 3072)))
    saved = single.nbytes("int8") - single.nbytes("int8", "w4a16")
    assert saved == 3 * 3072**2 * 2 - FORMATS["w4a16"](9216, 3072)
    assert shape_of(headers.flux(1, 2), "F8_E4M3").nbytes("int8") == shape.nbytes()  # as it is stored


def test_embedders_within_layers_see_one_row_and_stay():
    inner = headers.linear("blocks.0.attn", 512, 512) | headers.linear("blocks.0.mlp", 512, 512)
    shapes = inner | {n.replace("0", "1"): s for n, s in inner.items()}
    plain = shape_of(shapes)
    more = shape_of(
        shapes | headers.linear("blocks.1.norm1.emb.timestep_embedder.linear_1", 512, 512, bias=False)
    )
    assert more.nbytes("int8") - plain.nbytes("int8") == 2 * 512**2
    assert more.work(100, 0, 1)[1].linear - plain.work(100, 0, 1)[1].linear == 2 * 512**2


@pytest.mark.parametrize("leaf, dtype", [("weight", "U8"), ("qweight", "I8")])
def test_two_numbers_in_a_byte(leaf, dtype):
    shapes = {n.removesuffix("weight") + leaf: s for n, s in headers.flux(1, 2).items() if len(s) == 2}
    packed = model_shape([Entry(n, dtype, (o, i // 2), o * i // 2) for n, (o, i) in shapes.items()])
    assert packed.width == 3072
    assert packed.work(4096, 512, 1) == shape_of(headers.flux(1, 2)).work(4096, 512, 1)


def test_a_plan_of_flux_on_8_gib(flux):
    made = plan(flux, vram="8G", gpu="rtx4060")
    assert made.fits and made.tokens == 4096 and made.text_tokens == 512
    layers = made.resident_bytes + made.slot_bytes
    assert (
        layers + made.rest_bytes + made.activation_bytes + made.overhead_bytes
        == made.device_bytes
        <= made.vram
        == 8 * GIB
    )
    streamed = [i for i, name in enumerate(made.layers) if name in made.streamed]
    assert layers == device_bytes(made.layer_bytes, streamed) <= made.layer_budget
    assert streamed_layers(made.layer_bytes, budget=made.layer_budget) == tuple(streamed)
    assert made.host_bytes == sum(made.layer_bytes[i] for i in streamed) > 0
    assert made.resident_bytes + made.host_bytes + made.rest_bytes == made.format_bytes["as stored"]
    assert made.activation_bytes == 2 * 4608 * (2 * 3072 + 15360 + 21504)
    assert made.compute_s == pytest.approx(made.flop / 30.2e12)
    assert made.link_s == pytest.approx(made.host_bytes / (0.8 * 8 * 16e9 / 8 * 128 / 130))
    assert made.step_s >= max(made.compute_s, made.memory_s, made.link_s)
    guided = plan(flux, vram="8G", gpu="rtx4060", batch=2)
    assert guided.flop == 2 * made.flop and guided.activation_bytes == 2 * made.activation_bytes


def test_copies_can_be_what_takes_longest(flux):
    made = plan(flux, vram="3G", gpu="rtx4060", resolution="256x256", text_tokens=128)
    assert made.tokens == 256 and made.step_s == made.link_s > made.compute_s


def test_few_tokens_wait_for_weights(flux):
    made = plan(flux, gpu="h100", tokens=1, text_tokens=0)
    assert made.compute_s < made.memory_s
    assert made.step_s == pytest.approx(made.format_bytes["as stored"] / 3.35e12)


def test_tokens(tmp_path, flux):
    assert plan(flux, vram="8G", resolution="1000x520").tokens == 63 * 33
    assert plan(flux, vram="8G", tokens=77).tokens == 77
    shapes = {n: s for n, s in headers.flux(0, 2).items() if not n.startswith("txt_in")}
    alone = plan(headers.write_header(tmp_path / "a.safetensors", shapes), vram="8G", text_tokens=512)
    assert alone.text_tokens == 0 and "of text" not in str(alone)


def test_peaks_follow_the_format(flux):
    step = {q: plan(flux, gpu="h100", quant=q).compute_s for q in (None, "w4a16", "int8", "fp8")}
    assert step[None] == step["w4a16"] == pytest.approx(74.4 / 989, rel=2e-3)
    assert step["int8"] == step["fp8"] == pytest.approx(59.5 / 1979 + 14.9 / 989, rel=5e-3)
    assert plan(flux, gpu="a100", quant="fp8").compute_s == pytest.approx(74.4 / 312, rel=2e-3)  # has none


def test_what_does_not_fit_says_what_would(flux):
    small = plan(flux, vram="2G")
    assert not small.fits and small.missing > 0 and "are missing" in small.advice
    assert f"{small.missing / GIB:.2f} GiB too little" in str(small)
    smaller = plan(flux, vram=small.device_bytes)
    assert smaller.fits and len(smaller.streamed) == 57  # that much was missing, no more
    assert not plan(flux, vram=small.device_bytes - 1).fits
    assert "quant='int8-convrot', modulation='w4a16' takes" in small.advice
    assert "no format makes it fit" in plan(flux, vram="1G").advice


def test_unified_memory_streams_nothing(flux):
    made = plan(flux, gpu="orin-nano")
    assert not made.fits and not made.streamed and made.step_s is None
    assert "its memory is the host's" in made.advice and "quant='w4a16'" in made.advice
    assert plan(flux, gpu="orin-nano", quant="w4a16", modulation="w4a16").fits
    assert plan(flux, gpu="agx-orin").fits


def test_memory_of_the_host_is_a_limit(flux):
    free = plan(flux, vram="8G")
    made = plan(flux, vram="8G", ram=free.host_bytes - 1)
    assert not made.fits and made.missing == 1 and "host's memory" in made.advice
    assert plan(flux, vram="8G", ram=free.host_bytes).fits


def test_json_and_table(flux):
    made = plan(flux, vram="8G", gpu="rtx4060", quant="int8-convrot", modulation="w4a16", steps=4)
    found = json.loads(made.to_json())
    assert found["device_bytes"] == made.device_bytes and found["gpu"] == "rtx4060"
    table = str(made)
    for words in (
        "int8-convrot (modulation w4a16), 4096 tokens and 512 of text, batch 1",
        f"{len(made.streamed)} layers in turn, 1 ahead",
        f"{57 - len(made.streamed)} of 57",
        "a step, at best",
        "4 steps",
        *made.assumptions,
    ):
        assert words in table
    assert "a step" not in str(plan(flux, vram="8G"))


# --- files ---


def test_a_header_is_enough_and_shards_are_summed(tmp_path):
    shapes = headers.flux(2, 3)
    whole = headers.write_header(tmp_path / "whole.safetensors", shapes)
    assert whole.stat().st_size > sum(e.nbytes for e in read_entries(whole))
    alone = headers.write_header(tmp_path / "header.safetensors", shapes, whole=False)
    assert read_entries(alone) == read_entries(whole)
    folder = tmp_path / "model" / "transformer"
    folder.mkdir(parents=True)
    names, weight_map = list(shapes), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = headers.write_header(folder / f"part-{i}.safetensors", {n: shapes[n] for n in part})
        weight_map |= dict.fromkeys(part, file.name)
    (folder / "part.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert sorted(read_entries(tmp_path / "model")) == sorted(read_entries(whole))
    assert plan(tmp_path / "model", vram="8G").layers == plan(whole, vram="8G").layers
    (folder / "part-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"part-1\.safetensors"):
        read_entries(tmp_path / "model")


def test_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "flux")
    for name, shape in headers.flux(2, 2, d=256).items():
        numbers = np.zeros(shape, np.float32)
        if len(shape) == 2 and shape[1] % 256 == 0:
            packed = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shape = model_shape(read_entries(tmp_path / "model.gguf"))
    assert (len(shape.layers), shape.width) == (4, 256)
    linear1 = next(e for e in read_entries(tmp_path / "model.gguf") if e.name.endswith("linear1.weight"))
    assert (linear1.dtype, linear1.shape, linear1.nbytes) == ("Q8_0", (1792, 256), 1792 * 256 * 34 // 32)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "a safetensors file is required"),
        (b"\xff" * 8, "a safetensors file is required"),
        (b"\x08\0\0\0\0\0\0\0{}", "a safetensors file is required"),
        (b"\x02\0\0\0\0\0\0\0[]", "a header of names"),
        (b"\x02\0\0\0\0\0\0\0{}", "a file with tensors"),
        (b'\x0a\0\0\0\0\0\0\0{"a": {}} ', "must have .'data_offsets', 'dtype', 'shape'"),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        plan(path, vram="8G")


def test_folders_and_models_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no file"):
        plan(tmp_path / "missing", vram="8G")
    with pytest.raises(FileNotFoundError, match="found none"):
        plan(tmp_path, vram="8G")
    for name in "ab":
        headers.write_header(tmp_path / f"{name}.safetensors", {"layer.weight": (64, 64)})
    with pytest.raises(ValueError, match=r"one model is required, got 2 files: a\.safetensors"):
        plan(tmp_path, vram="8G")
    with pytest.raises(ValueError, match="numbered layers"):
        plan(tmp_path / "a.safetensors", vram="8G")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        plan(tmp_path / "x.json", vram="8G")


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "vram or a gpu is required"),
        ({"vram": "8 apples"}, "a size like 8G"),
        ({"vram": 0}, "a size like 8G"),
        ({"vram": "1.2.3G"}, "a size like 8G"),
        ({"gpu": "rtx9999"}, "the board must be one of orin-nano"),
        ({"vram": 1, "quant": "int3"}, "quant must be one of int8"),
        ({"vram": 1, "modulation": "int3"}, "modulation must be one of int8"),
        ({"vram": 1, "resolution": "big"}, "width x height"),
        ({"vram": 1, "resolution": (0, 8)}, "width x height"),
        ({"vram": 1, "resolution": "8x8", "tokens": 1}, "got both"),
        ({"vram": 1, "tokens": 0}, "at least one token"),
        ({"vram": 1, "batch": 0}, "batch and steps of at least 1"),
    ],
)
def test_bad_input(flux, options, message):
    with pytest.raises(ValueError, match=message):
        plan(flux, **options)


def test_sizes_of_memory():
    assert [read_bytes(s) for s in ("8G", "8GiB", "8GB", "7.5g", "512 M", 1000)] == [
        8 << 30,
        8 << 30,
        8 * 10**9,
        int(7.5 * 2**30),
        512 << 20,
        1000,
    ]


def test_boards():
    assert board("RTX 4060") is BOARDS["rtx4060"]
    for b in BOARDS.values():
        assert b.peaks["int8"] >= 1.9 * b.peaks["bf16"] and b.source and b.memory >= 8 * GIB
        assert b.unified == ("orin" in b.name) and b.peak("nonsense") == b.peaks["bf16"]
    assert BOARDS["agx-orin"].peaks["int8"] == pytest.approx(170e12 / 2, rel=0.01)  # sparse, in its brief
    assert BOARDS["orin-nano"].peaks["int8"] == pytest.approx(40e12 / 2, rel=0.03)
    assert BOARDS["orin-nano-super"].peaks["int8"] == pytest.approx(67e12 / 2, rel=0.01)
