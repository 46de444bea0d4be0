"""Files that are damaged, lie, or are of another kind: refused with file, tensor and what is required."""

import json
import pickle
import random
import zipfile

import pytest
import torch

from rfkernels.formats import read
from rfkernels.formats.container import open_checkpoint, write_safetensors
from rfkernels.formats.header import read_header

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path, header, data=bytes(8)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    "message, header",
    [
        (r"'a': F32 \[3\] takes 12 bytes, got data_offsets \[0, 8\], 8 bytes", {"a": ONE | {"shape": [3]}}),
        (r"'a': F64 \[2\] takes 16 bytes", {"a": ONE | {"dtype": "F64"}}),
        (r"'a': F32 \[1\] takes 4 bytes", {"a": ONE | {"shape": [1]}}),
        (r"'a': F32 \[0\] takes 0 bytes", {"a": ONE | {"shape": [0], "data_offsets": [8, 0]}}),
        (r"'a' must have a dtype of F4, .*, got 'F31'", {"a": ONE | {"dtype": "F31"}}),
        (r"'a' must have a dtype of", {"a": ONE | {"dtype": ["F32"]}}),
        (r"'b' must start at 8, got 0: it overlaps 'a'", {"a": ONE, "b": ONE}),
        (r"'a' must start at 0, got 4: it leaves a hole", {"a": ONE | {"data_offsets": [4, 12]}}),
        (r"16 bytes of tensors are required, found 8: the file is truncated",
         {"a": ONE, "b": ONE | {"data_offsets": [8, 16]}}),
        (r"4 bytes of tensors are required, found 8: the file is followed",
         {"a": ONE | {"shape": [1], "data_offsets": [0, 4]}}),
        (r"'a' must have counts as shape", {"a": ONE | {"shape": [-2]}}),
        (r"'a' must have counts as shape", {"a": ONE | {"shape": [2.0]}}),
        (r"'a' must have counts as shape", {"a": ONE | {"data_offsets": [0, 8, 8]}}),
        (r"'a' must have \['data_offsets', 'dtype', 'shape'\]", {"a": [1]}),
        (r"'a' must have \['data_offsets', 'dtype', 'shape'\]", {"a": ONE | {"extra": 1}}),
        (r"__metadata__ must be an object of strings", {"a": ONE, "__metadata__": {"n": 1}}),
        (r"a header of names and tensors is required, got a list", [ONE]),
        (r"a header in JSON is required, got: 'a' is there twice", b'{"a":0,"a":0}'),
        (r"a header in JSON is required", b"{" * 40),
        (r"a header in JSON is required", b"[" * 50000),
        (r"a header in JSON is required", b'{"\xff": 1}'),
    ],
)  # fmt: skip
def test_lies(message, header, tmp_path):
    path = write(tmp_path / "x.safetensors", header)
    for function in (open_checkpoint, lambda p: list(read(p))):
        with pytest.raises(ValueError, match=r"x\.safetensors: " + message):
            function(path)


def test_lengths_of_headers(tmp_path):
    path = tmp_path / "x.safetensors"
    for raw in (b"", b"1234567", (200).to_bytes(8, "little") + bytes(199), (1 << 63).to_bytes(8, "little")):
        path.write_bytes(raw)
        with pytest.raises(
            ValueError, match=r"x.safetensors: a safetensors file is required, got a header of"
        ):
            read_header(path)
    with path.open("wb") as file:  # sparse: within the file and above 100 MB
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_100)
    with pytest.raises(ValueError, match="header of 100,000,001 bytes, not at most 100,000,000"):
        read_header(path)
    with pytest.raises(
        FileNotFoundError, match=r"y\.safetensors: a safetensors file is required, found none"
    ):
        open_checkpoint(tmp_path / "y.safetensors")


def test_pickles_are_not_opened(tmp_path, monkeypatch):
    def opened(*_):
        raise AssertionError("a pickle was opened")

    for function in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, function, opened)
    monkeypatch.setattr(torch, "load", opened)
    with zipfile.ZipFile(tmp_path / "a.safetensors", "w") as file:
        file.writestr("data.pkl", b"")
    for protocol in range(2, 6):
        path = tmp_path / f"b{protocol}.safetensors"
        path.write_bytes(pickle.dumps({"a": list(range(99))}, protocol))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=rf"{path.name}: .* is required, got a pickle by content"):
            open_checkpoint(path)
    for suffix in ("ckpt", "pt", "pth", "bin", "PT"):
        path = write(tmp_path / f"c.{suffix}", {"a": ONE})
        with pytest.raises(ValueError, match="got a pickle by name: it runs code"):
            list(read(path))


@pytest.mark.parametrize("length", [0x0280, 0x0480])
def test_a_header_may_begin_like_a_pickle(length, tmp_path):
    header = json.dumps({"a": ONE}).encode().ljust(length)
    assert open_checkpoint(write(tmp_path / "x", header))["a"].tolist() == [0, 0]


def test_every_dtype_that_the_file_may_name(tmp_path):
    """Is read, or refused by name."""
    for dtype, width in (
        ("F8_E8M0", 1),
        ("F6_E2M3", 0.75),
        ("U16", 2),
        ("U32", 4),
        ("U64", 8),
        ("C64", 8),
        ("F4", 0.5),
    ):
        size = int(8 * width)
        path = write(tmp_path / "x", {"a": ONE | {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}},
                     bytes(size))  # fmt: skip
        checkpoint = open_checkpoint(path)
        assert checkpoint.dtype("a") == dtype and checkpoint.shape("a") == (8,)
        try:
            assert checkpoint["a"].nbytes == size
        except ValueError as error:
            assert "x: a has the dtype" in str(error)


def test_fuzzed_files_are_read_or_refused(tmp_path):
    """Truncations and flips of bytes: the errors of a file, or the tensors that a valid file holds."""
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c.d": torch.arange(4)}
    good, path = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    write_safetensors(good, tensors.items(), {"k": "v"})
    raw, draw = good.read_bytes(), random.Random(0)
    length, refused = 8 + int.from_bytes(raw[:8], "little"), 0
    for turn in range(600):
        bad = bytearray(raw[: draw.randrange(len(raw))] if turn % 4 == 0 else raw)
        for _ in range(draw.randrange(1, 4) if turn % 4 else 0):
            bad[draw.randrange(length if turn % 2 else len(raw))] = draw.randrange(256)
        path.write_bytes(bad)
        try:
            found = {name: tensor.clone() for name, tensor in open_checkpoint(path).items()}
        except ValueError as error:
            assert "bad.safetensors: " in str(error)
            refused += 1
            continue
        assert sum(t.nbytes for t in found.values()) == sum(t.nbytes for t in tensors.values())
        for name in set(found) & set(tensors) if bad[:length] == raw[:length] else ():
            same = bad[length:] == raw[length:]
            assert not same or torch.equal(found[name], tensors[name])
    assert 300 < refused < 600
