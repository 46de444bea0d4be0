"""`rfkernels inspect`, `convert` and `quantize`."""

import json

import numpy as np
import pytest
import torch

import rfkernels
from rfkernels.formats import native
from rfkernels.formats.container import open_checkpoint
from rfkernels.formats.writer import write_safetensors
from tests.cli.conftest import one_line
from tests.formats.families import SIZES, make, same, tiny, write

pytest.importorskip("diffusers")
CONFIG = {"attention_head_dim": 32, "axes_dims_rope": (8, 12, 12), "num_single_layers": 1}


@pytest.fixture
def file(tmp_path):
    return write(tiny("flux", torch.bfloat16, **CONFIG), tmp_path / "in.safetensors", title="a\nb")


def test_inspect(run, file):
    ran = run("inspect", file)
    parameters = sum(p.numel() for p in tiny("flux", **CONFIG).parameters())
    assert ran.code == 0 and ran.err == ""
    for line in (
        "model     flux  (FluxTransformer2DModel)",
        "naming    diffusers",
        "format    plain",
        f"{parameters:,} parameters, {2 * parameters:,} bytes",
        "metadata  title: a b",
    ):
        assert line in ran.out
    assert "num_layers=2, num_single_layers=1, attention_head_dim=32" in ran.out
    assert any(
        line.split()[1] == "transformer_blocks.*" and line.endswith("x 2") for line in ran.out.splitlines()
    )
    listed = run("inspect", file, "--tensors").out.splitlines()
    assert "x_embedder.weight  bfloat16[64, 8]" in listed


def test_inspect_prints_json(run, file):
    ran = run("inspect", file, "--json", "--tensors")
    found = json.loads(ran.out)
    state = tiny("flux", **CONFIG).state_dict()
    assert ran.err == "" and found["family"] == "flux" and found["tensors"] == len(state)
    assert found["dtypes"] == {"bfloat16": {k: found[k] for k in ("tensors", "parameters", "bytes")}}
    assert sum(series["bytes"] for series in found["blocks"].values()) == found["bytes"]
    assert found["blocks"]["transformer_blocks.*"]["blocks"] == 2
    assert found["tensor_list"]["proj_out.bias"] == {"dtype": "bfloat16", "shape": [8]}


@pytest.mark.parametrize(
    "method, layout",
    [("int8", "comfy"), ("w4a16", "comfy"), ("w4a16", "native"), ("svdq-int4", "comfy")],
)
def test_inspect_counts_the_parameters_of_packed_weights(run, file, method, layout):
    plain = json.loads(run("inspect", file, "--json").out)
    assert run("quantize", file, "q.safetensors", "--method", method, "--layout", layout).code == 0
    found = json.loads(run("inspect", "q.safetensors", "--json").out)
    assert found["parameters"] == plain["parameters"] and found["format"] == layout
    assert found["config"] == plain["config"] and found["bytes"] < plain["bytes"]


def test_inspect_of_other_files(run, tmp_path):
    write_safetensors(tmp_path / "lora.safetensors", [("a.lora_down.weight", torch.ones(2, 3))])
    ran = run("inspect", "lora.safetensors")
    assert ran.code == 0 and "model     unknown" in ran.out and "6 parameters" in ran.out


def test_inspect_of_gguf_files(run, tmp_path):
    """Bytes of every type of block, by the gguf package."""
    gguf = pytest.importorskip("gguf")
    kinds = ["F32", "F16", "BF16", *(f"Q{n}_{k}" for n in (4, 5) for k in (0, 1)), "Q8_0"]
    kinds += [*(f"Q{n}_K" for n in range(2, 7)), "IQ4_NL", "IQ4_XS"]
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    sizes = {}
    for kind in kinds:
        numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        sizes[kind] = 512 // numbers * size
        raw = np.zeros((2, sizes[kind] // 2), np.uint8)
        writer.add_tensor(f"l.{kind}.weight", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    found = json.loads(run("inspect", "a.gguf", "--json").out)
    assert {kind: row["bytes"] for kind, row in found["dtypes"].items()} == sizes
    assert found["format"] == "gguf" and found["parameters"] == 512 * len(kinds)


def test_names_do_not_drive_the_terminal(run, file, tmp_path):
    evil = {**open_checkpoint(file), "\x1b[31mred": torch.ones(1)}
    write_safetensors(tmp_path / "evil.safetensors", evil.items(), {"\x1b[2J": "\x1b]0;title\a"})
    assert "\x1b" not in run("inspect", "evil.safetensors", "--tensors").out
    ran = run("convert", "evil.safetensors", "b")
    assert one_line(ran, ["[31mred"]) and "\x1b" not in ran.err


def test_convert(run, file, tmp_path):
    ran = run("convert", file, "a.safetensors", "--to", "original", "--prefix", "model.diffusion_model.")
    assert ran.code == 0 and ran.out == "" and ran.err == "wrote a.safetensors\n"
    assert "naming    original, prefix model.diffusion_model." in run("inspect", "a.safetensors").out
    assert (
        run("convert", "a.safetensors", "b.safetensors", "--to", "diffusers", "--dtype", "fp16", "-q").err
        == ""
    )
    same(open_checkpoint("b.safetensors"), tiny("flux", torch.bfloat16, **CONFIG).half().state_dict())
    assert run("convert", file, "c.safetensors", "--shard-size", "100KB").code == 0
    assert "flux" in run("inspect", "c.safetensors.index.json").out


@pytest.mark.parametrize("format", ["--json", None])
def test_quantize(run, file, format):
    options = [
        "--method",
        "w4a8",
        "--modulation",
        "w4a16",
        "--group",
        32,
        "--skip",
        "*.to_v",
        "--min-size",
        0,
    ]
    ran = run("quantize", file, "q.safetensors", *options, *([format] if format else []))
    model = tiny("flux", torch.bfloat16, **CONFIG)
    report = rfkernels.quantize(model, "w4a8", modulation="w4a16", group=32, skip=("*.to_v",), min_size=0)
    assert ran.code == 0 and ran.err == "wrote q.safetensors\n"
    if format:
        assert json.loads(ran.out)["totals"] == json.loads(report.to_json())["totals"]
    else:
        assert ran.out.splitlines()[-1] == str(report).splitlines()[-1]
    back = native.load_quantized(lambda: make("flux", SIZES["flux"]["config"] | CONFIG), "q.safetensors")
    same(back.state_dict(), model.state_dict())


def test_errors_are_one_line(run, file, tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"PK\x03\x04")
    write_safetensors(tmp_path / "other.safetensors", [("a", torch.ones(1))])
    assert one_line(run("inspect", "none.safetensors"), ["none.safetensors", "found none"])
    assert one_line(run("inspect", "x.ckpt"), ["x.ckpt", "pickle"])
    assert one_line(run("convert", "other.safetensors", "b"), ["a model of", "got 1 keys"])
    assert one_line(run("convert", file, "b", "--to", "bfl"), ["diffusers", "'bfl'"])
    assert one_line(run("convert", file, "b", "--dtype", "fp4"), ["--dtype", "fp4"])
    assert one_line(run("convert", file, "b", "--shard-size", "five"), ["--shard-size", "five"])
    assert one_line(run("convert", file, "no/b"), ["no"])
    assert one_line(run("quantize", file, "b", "--method", "int3"), ["int8-convrot", "'int3'"])
    assert one_line(run("quantize", file, "b"), ["method"])
    assert not (tmp_path / "b").exists()
