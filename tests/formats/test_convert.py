"""Files into files: names both ways by diffusers' own converters, dtypes, quantised layers."""

import json
import weakref
from collections.abc import Mapping

import pytest
import torch

import rfkernels
from rfkernels.formats import comfy, fp8, load, native
from rfkernels.formats.container import open_checkpoint
from rfkernels.formats.convert import convert
from rfkernels.formats.writer import write_safetensors
from tests.adapters import models
from tests.formats.families import CONVERTED, SIZES, class_of, same, tiny, write

pytest.importorskip("diffusers")
SMALL = {"attention_head_dim": 32, "axes_dims_rope": (8, 12, 12), "num_layers": 1, "num_single_layers": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Of each family, once: the state dict, its file, and that file in the original naming."""
    made = {}

    def of(family):
        if family not in made:
            folder = tmp_path_factory.mktemp("files")
            state = tiny(family).state_dict()
            ours = write(tiny(family), folder / "ours.safetensors", about="a test")
            convert(ours, folder / "theirs.safetensors", to="original")
            made[family] = state, ours, folder / "theirs.safetensors"
        return made[family]

    return of


def converted(family, state, monkeypatch):
    """diffusers' converter at the size of the tiny model."""
    monkeypatch.setitem(models.SIZES, family, SIZES[family])
    return models.converted(family, state)


@pytest.mark.parametrize("family", CONVERTED)
def test_original_files_are_what_diffusers_reads(family, files, monkeypatch):
    state, _, theirs = files(family)
    original = {name: tensor.clone() for name, tensor in open_checkpoint(theirs).items()}
    assert family == "hidream" or set(original) != set(state)
    same(converted(family, original, monkeypatch), state)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("family", [*CONVERTED, "qwen-image"])
def test_round_trip(family, prefix, files, tmp_path):
    state, _, theirs = files(family)
    convert(theirs, tmp_path / "a.safetensors", to="original", prefix=prefix)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers")
    found = open_checkpoint(tmp_path / "b.safetensors")
    same(found, state)
    assert found.metadata == {"about": "a test", "format": "pt"}


@pytest.mark.parametrize("family", ["dit", "pixart"])
def test_families_of_one_naming(family, files, tmp_path):
    ours = write(tiny(family), tmp_path / "ours.safetensors")
    convert(ours, tmp_path / "a.safetensors", dtype=torch.bfloat16)
    same(open_checkpoint(tmp_path / "a.safetensors"), tiny(family).bfloat16().state_dict())
    with pytest.raises(
        ValueError, match=f"names of 'diffusers', .*, are required for {family}, got 'original'"
    ):
        convert(ours, tmp_path / "b.safetensors", to="original")


def test_extras_of_original_files_are_left_out(files, tmp_path):
    for family, name in (("z-image", "norm_final.weight"), ("flux3", "repa_projectors.0.weight")):
        state, _, theirs = files(family)
        more = {**open_checkpoint(theirs), name: torch.ones(3)}
        write_safetensors(tmp_path / "more", more.items())
        convert(tmp_path / "more", tmp_path / "a", to="diffusers")
        same(open_checkpoint(tmp_path / "a"), state)


def test_shards_both_ways(files, tmp_path):
    state, ours, _ = files("flux")
    convert(ours, tmp_path / "m.safetensors", to="original", max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("m-*-of-*.safetensors"))) > 2
    convert(tmp_path / "m.safetensors.index.json", tmp_path / "one.safetensors", to="diffusers")
    same(open_checkpoint(tmp_path / "one.safetensors"), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts(dtype, files, tmp_path):
    state, _, theirs = files("sd3")
    convert(theirs, tmp_path / "a", to="diffusers", dtype=dtype, metadata={"about": "a cast"})
    assert open_checkpoint(tmp_path / "a").metadata == {"about": "a cast", "format": "pt"}
    same(open_checkpoint(tmp_path / "a"), {name: tensor.to(dtype) for name, tensor in state.items()})


def test_casts_decode_fp8(files, tmp_path):
    """ComfyUI's old and new dialects, and BFL's, give the numbers of the layers."""
    model = tiny("flux")
    rfkernels.quantize(model, "fp8", min_size=0)
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, rfkernels.nn.QuantLinear):
            expected |= {
                f"{name}.weight": module.dequantized().bfloat16(),
                f"{name}.bias": module.bias.bfloat16(),
            }
    rest = {
        n: t.bfloat16()
        for n, t in model.state_dict().items()
        if n.rpartition(".")[0] + ".weight" not in expected
    }
    for write_file in (comfy.write, fp8.write):
        write_file(model, tmp_path / "q")
        convert(tmp_path / "q", tmp_path / "a", dtype=torch.bfloat16)
        same(open_checkpoint(tmp_path / "a"), expected | rest)
        convert(tmp_path / "q", tmp_path / "b", dtype=torch.bfloat16, to="original")
        convert(tmp_path / "b", tmp_path / "c", to="diffusers")
        same(open_checkpoint(tmp_path / "c"), expected | rest)


@pytest.mark.parametrize("method", ["int8-convrot", "w4a16"])
@pytest.mark.parametrize("naming", ["diffusers", "original"])
def test_quantising_a_file_is_quantising_the_model(method, naming, files, tmp_path):
    options = {"min_size": 0, "modulation": "w4a16"}
    ours = write(tiny("flux", **SMALL), tmp_path / "ours.safetensors")
    convert(ours, tmp_path / "source", to=naming)
    report = convert(tmp_path / "source", tmp_path / "a", method=method, **options)
    model = tiny("flux", **SMALL)
    expected = rfkernels.quantize(model, method, **options)
    if naming == "diffusers":
        assert {e.name: e for e in report.layers} == {e.name: e for e in expected.layers}
    back = native.load_quantized(lambda: class_of("flux")(**SIZES["flux"]["config"] | SMALL), tmp_path / "a")
    same(back.state_dict(), model.state_dict())
    assert sum(e.format == method for e in report.layers) > 10


@pytest.mark.parametrize("family", SIZES)
def test_a_file_has_the_linear_layers_of_its_model(family, tmp_path):
    """No table, router or embedding is taken for one, and the rules are those of the class."""
    model = tiny(family)
    report = convert(
        write(model, tmp_path / "a"), tmp_path / "b", method="int8", modulation="fp8", min_size=0
    )
    expected = rfkernels.quantize(model, "int8", modulation="fp8", min_size=0)
    assert {e.name: e for e in report.layers} == {e.name: e for e in expected.layers}


def test_comfy_layout_keeps_names_and_loads(files, tmp_path):
    ours = write(tiny("flux", **SMALL), tmp_path / "ours.safetensors")
    convert(ours, tmp_path / "theirs", to="original")
    report = convert(tmp_path / "theirs", tmp_path / "q", method="int8-convrot", layout="comfy", min_size=0)
    found = open_checkpoint(tmp_path / "q")
    marks = json.loads(found.metadata["_quantization_metadata"])["layers"]
    assert "double_blocks.0.img_attn.qkv" in marks and "img_in" not in marks
    assert marks.keys() == {e.name for e in report.layers if e.format != "high"}
    target = tiny("flux", **SMALL)
    load(target, tmp_path / "q", rename=rfkernels.formats.original_names(target))
    model = tiny("flux", **SMALL)
    rfkernels.quantize(model, "int8-convrot", min_size=0)
    for name, module in model.named_modules():
        if isinstance(module, rfkernels.nn.QuantLinear):
            assert torch.equal(target.get_submodule(name).dequantized(), module.dequantized()), name


@pytest.mark.parametrize("method", ["fp8", "w4a16", "w4a8"])
def test_quantised_layers_are_put_together_and_parted(method, tmp_path):
    """native -> ComfyUI with original names -> native: the same codes."""
    options = {"group": 0} if method == "w4a8" else {}
    ours = write(tiny("flux", **SMALL), tmp_path / "ours.safetensors")
    convert(ours, tmp_path / "a", method=method, min_size=0, **options)
    convert(tmp_path / "a", tmp_path / "b", to="original", layout="comfy")
    convert(tmp_path / "b", tmp_path / "c")
    first, last = open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "c")
    for name in first:
        a, b = first[name], last[name].reshape(first[name].shape)
        assert torch.equal(a.float(), b.float()) if a.is_floating_point() else torch.equal(a, b), name


def test_layers_quantised_apart_need_a_dtype(tmp_path):
    model = tiny("flux")
    rfkernels.quantize(model, "fp8", min_size=0, skip=("*.to_k",))
    native.save_quantized(model, tmp_path / "a")
    with pytest.raises(
        ValueError, match=r"img_attn.qkv.weight must be alike, got \['fp8', torch.float32, 'fp8'\]"
    ):
        convert(tmp_path / "a", tmp_path / "b", to="original", layout="comfy")
    assert not (tmp_path / "b").exists()
    convert(tmp_path / "a", tmp_path / "b", to="original", dtype=torch.bfloat16)
    assert all(t.dtype == torch.bfloat16 for t in open_checkpoint(tmp_path / "b").values())


def test_tables_in_float8_are_no_layers(tmp_path):
    """A cast of every matrix, as trainers write it: what is no linear layer comes as numbers."""
    state = tiny("dit", torch.bfloat16).state_dict()
    cast = {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for n, t in state.items()}
    write_safetensors(tmp_path / "a", cast.items())
    convert(tmp_path / "a", tmp_path / "b")
    found = native.load_quantized(tiny("dit"), tmp_path / "b")
    table = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table"
    assert isinstance(found.get_submodule(table), torch.nn.Embedding)
    assert torch.equal(found.get_submodule(table).weight, cast[f"{table}.weight"].bfloat16())
    assert found.transformer_blocks[0].attn1.to_q.format == "fp8"


class OnDemand(Mapping):
    """A state dict whose tensors are made when they are asked for, and how many of them are alive."""

    def __init__(self, state):
        self._state, self._made = state, []

    def __getitem__(self, name):
        tensor = self._state[name].clone()
        self._made.append(weakref.ref(tensor))
        return tensor

    def __iter__(self):
        return iter(self._state)

    def __len__(self):
        return len(self._state)

    def alive(self):
        return sum(tensor() is not None for tensor in self._made)


@pytest.mark.parametrize("to", ["diffusers", "original"])
@pytest.mark.parametrize("method", [None, "int8"])
def test_one_tensor_is_in_memory(to, method, files, tmp_path):
    state, _, theirs = files("flux")
    source = OnDemand(state if to == "original" else dict(open_checkpoint(theirs)))
    most = []
    options = {"method": method, "layout": "comfy", "min_size": 0} if method else {}
    convert(source, tmp_path / "a", to=to, progress=lambda name: most.append(source.alive()), **options)
    assert len(most) > 60 and max(most) <= (1 if to == "diffusers" else 2 * 4)


def test_refusals(files, tmp_path):
    state, ours, theirs = files("flux")
    target = tmp_path / "out"

    def refuses(message, source=ours, changes=None, **options):
        if changes is not None:
            write_safetensors(tmp_path / "in", (state | changes).items())
            source = tmp_path / "in"
        with pytest.raises(ValueError, match=message):
            convert(source, target, **options)
        assert not target.exists() and not list(tmp_path.glob("*.partial"))

    refuses(r"names of a flux model in the diffusers naming are required, got 1 others: \['odd.weight'\]",
            changes={"odd.weight": torch.ones(1)})  # fmt: skip
    refuses(r"others: \['proj_out.lora_A'\]", changes={"proj_out.lora_A": torch.ones(1)})
    without = {n: t for n, t in state.items() if n != "transformer_blocks.0.attn.to_k.bias"}
    write_safetensors(tmp_path / "less", without.items())
    refuses(r"img_attn.qkv.bias takes .*, the file lacks \['transformer_blocks.0.attn.to_k.bias'\]",
            source=tmp_path / "less", to="original")  # fmt: skip
    refuses("proj_out.bias must fit float16, got numbers to 70000",
            changes={"proj_out.bias": torch.full((8,), 7e4)}, dtype=torch.float16)  # fmt: skip
    wide = torch.full((8, 24), 448.0).to(torch.float8_e4m3fn)
    refuses(r"got 1 others: \['odd.weight'\]",
            changes={"odd.weight": torch.ones(1), "proj_out.weight": wide})  # fmt: skip
    refuses("proj_out.weight must fit float16, got numbers to 89600",
            changes={"proj_out.weight": wide, "proj_out.weight_scale": torch.tensor(200.0)},
            dtype=torch.float16)  # fmt: skip
    refuses("a layout of .*, got 'bfl', 'native', None", to="bfl")
    refuses("a dtype of .* are required, got 'diffusers', 'native', torch.float64", dtype=torch.float64)
    refuses("the method must be one of int8, .*, got 'int3'", method="int3")
    refuses(r"a method is required for \['group'\]", group=64)
    refuses("'native' has names of diffusers, got those of 'original': ", method="int8", to="original")
    refuses("got those of 'diffusers' and the prefix 'a.'", method="int8", prefix="a.")
    bad = {n: t for n, t in open_checkpoint(theirs).items()}
    bad["double_blocks.0.img_attn.qkv.weight"] = torch.ones(25, 24)
    write_safetensors(tmp_path / "bad", bad.items())
    refuses(
        "img_attn.qkv.weight must have rows for 3 parts, q of 24, got 25",
        source=tmp_path / "bad",
        to="diffusers",
    )
    refuses(r"flux.* is required, got 1 keys like \['a'\]", source={"a": torch.ones(1)})
