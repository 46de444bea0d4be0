"""Checkpoints in several files: one mapping, and what must agree between index and files."""

import json

import pytest
import torch

from rfkernels.formats import load, read
from rfkernels.formats.container import open_checkpoint
from rfkernels.formats.writer import Writer, header_room, write_safetensors


def tensors():
    torch.manual_seed(0)
    return {f"l.{i}.weight": torch.randn(8, 4) for i in range(5)} | {"e": torch.randn(100).bfloat16()}


@pytest.fixture
def shards(tmp_path):
    """Three files and their index."""
    paths = write_safetensors(tmp_path / "m.safetensors", tensors().items(), {"k": "v"}, max_shard_bytes=400)
    assert [p.name for p in paths] == [f"m-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + [
        "m.safetensors.index.json"
    ]
    return tmp_path


def index(shards, change=None):
    path = shards / "m.safetensors.index.json"
    found = json.loads(path.read_text())
    if change is not None:
        change(found["weight_map"])
        path.write_text(json.dumps(found))
    return found


def test_round_trip(shards):
    for source in (shards, shards / "m.safetensors.index.json"):
        found = open_checkpoint(source)
        assert set(found) == set(tensors()) and found.metadata == {"k": "v"}
        for name, tensor in tensors().items():
            assert torch.equal(found[name], tensor)
            assert found.dtype(name) == tensor.dtype and found.shape(name) == tensor.shape
        assert set(dict(read(source))) == set(found)
    total = sum(t.nbytes for t in tensors().values())
    assert index(shards)["metadata"] == {"total_size": total} and not list(shards.glob("*.partial"))


def test_shards_are_those_of_others(shards):
    """safetensors' own reader, file by file, and transformers' layout of the index."""
    from safetensors.torch import load_file

    for name, file in index(shards)["weight_map"].items():
        assert torch.equal(load_file(shards / file)[name], tensors()[name])
    sizes = [sum(t.nbytes for t in load_file(p).values()) for p in sorted(shards.glob("*.safetensors"))]
    assert max(sizes) <= 400 and len(sizes) == 3


def test_diffusers_shards_load(tmp_path):
    pytest.importorskip("diffusers")
    from tests.adapters.models import model_of

    model = model_of("flux", dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    back = load(model_of("flux", seed=1, dtype=torch.float32), tmp_path)
    assert all(torch.equal(t, back.state_dict()[n]) for n, t in model.state_dict().items())


def test_one_file_needs_no_index(tmp_path):
    assert write_safetensors(tmp_path / "x.safetensors", tensors().items(), max_shard_bytes=1 << 20) == [
        tmp_path / "x.safetensors"
    ]
    assert set(open_checkpoint(tmp_path)) == set(tensors())


def test_a_missing_shard(shards):
    (shards / "m-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index.json: shards .* there is no \['m-00002-of-00003"):
        open_checkpoint(shards)


def test_an_extra_shard(shards):
    write_safetensors(shards / "m-00004-of-00004.safetensors", [("z", torch.ones(1))])
    with pytest.raises(ValueError, match=r"there are also \['m-00004-of-00004.safetensors'\]"):
        open_checkpoint(shards)


def test_a_tensor_that_its_shard_lacks(shards):
    index(shards, lambda places: places.update(z="m-00002-of-00003.safetensors"))
    with pytest.raises(
        ValueError, match=r"m-00002-of-00003.safetensors: z must be there, says m.safetensors"
    ):
        open_checkpoint(shards)


def test_a_tensor_that_the_index_lacks(shards):
    index(shards, lambda places: places.pop("l.1.weight"))
    with pytest.raises(ValueError, match=r"m-00001-of-00003.safetensors: l.1.weight must be in the index"):
        open_checkpoint(shards)


def test_two_shards_with_one_name(shards):
    write_safetensors(shards / "m-00001-of-00003.safetensors", [
        *list(tensors().items())[:3], ("e", torch.ones(1)),
    ])  # fmt: skip
    both = "in m-00003-of-00003.safetensors and in m-00001-of-00003.safetensors"
    with pytest.raises(ValueError, match=rf"e must be in m-00003-of-00003.safetensors alone, is {both}"):
        open_checkpoint(shards)
    index(shards, lambda places: places.update({"l.0.weight": "m-00002-of-00003.safetensors"}))
    with pytest.raises(ValueError, match=r"l.0.weight must be in m-00002.* alone, is in m-00001"):
        open_checkpoint(shards)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "\xff"])
def test_indices_that_are_none(text, tmp_path):
    path = tmp_path / "m.safetensors.index.json"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=r"index.json: an index with the files of a weight_map is required"):
        open_checkpoint(path)


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "..", ""])
def test_shards_lie_beside_the_index(file, tmp_path):
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ValueError, match="names of files beside the index are required"):
        open_checkpoint(path)


def test_directories(tmp_path):
    with pytest.raises(FileNotFoundError, match="a directory with a safetensors file is required"):
        open_checkpoint(tmp_path)
    for name in "ab":
        write_safetensors(tmp_path / f"{name}.safetensors", [("t", torch.ones(1))])
    with pytest.raises(ValueError, match=r"one file, is required, got \['a.safetensors', 'b.safetensors'\]"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="an index of shards is required"):
        open_checkpoint(tmp_path / "m.safetensors.index.json")


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with (
        pytest.raises(ValueError, match="a is there twice"),
        Writer(tmp_path / "x", header_room("a"), max_shard_bytes=1) as writer,
    ):
        writer.add("a", torch.ones(1))
        writer.add("b", torch.ones(1))
        writer.add("a", torch.ones(1))
    with pytest.raises(ValueError, match="shards of 1 byte or more are required, got 0"):
        Writer(tmp_path / "x", 8, 0)
    with pytest.raises(ValueError, match="the name of a file is required, this is a directory"):
        Writer(tmp_path, 8)
    with (
        pytest.raises(ValueError, match="a header of 8 bytes must"),
        Writer(tmp_path / "x", 8) as writer,
    ):
        writer.add("a", torch.ones(1))
        writer.finish()
    assert not list(tmp_path.iterdir())


def test_a_writer_keeps_room_for_any_header(tmp_path):
    """Numbers of the header with as many digits as files have."""
    names = ["é" * 30, 'quote"', "w" * 200]
    with Writer(tmp_path / "x", header_room(names, {"a": "b" * 99})) as writer:
        for name in names:
            writer.add(name, torch.zeros(1, 1, 1, 1, 1))
        writer.finish({"a": "b" * 99})
    assert set(open_checkpoint(tmp_path / "x")) == set(names)
    with Writer(tmp_path / "y", 8) as writer:
        writer.finish()
    assert len(open_checkpoint(tmp_path / "y")) == 0
