"""A file of weights into another: names, dtypes, quantised layers; tensor by tensor, without a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfkernels.formats import comfy, gguf, native
from rfkernels.formats.container import open_checkpoint
from rfkernels.formats.detect import Architecture, Listing, detect, keys_of, listing
from rfkernels.formats.keys import Keys, is_dropped, is_linear
from rfkernels.formats.load import read
from rfkernels.formats.rows import Item, count_rows, decoded, join, take
from rfkernels.formats.writer import Writer, header_room
from rfkernels.nn import QuantLinear
from rfkernels.quantization import quantize_weight
from rfkernels.quantization.report import Layer, Report, compare
from rfkernels.quantization.rules import Choice

__all__ = ["LAYOUTS", "NAMINGS", "convert"]

NAMINGS, LAYOUTS = ("diffusers", "original"), ("native", "comfy")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAVES, _LEAF_ROOM = 8, 320  # of a quantised layer, and bytes of the header for each


def convert(
    source: str | Path | Mapping[str, Tensor],
    target: str | Path,
    *,
    to: str | None = None,
    dtype: torch.dtype | None = None,
    method: str | None = None,
    layout: str = "native",
    skip: Sequence[str] = (),
    keep: Sequence[str] | None = None,
    modulation: str | None = None,
    min_size: int = 1 << 14,
    prefix: str = "",
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Report:
    """Writes the weights of a file to another; in memory is one tensor, or the parts of a fused one.

    Args:
        source: a safetensors or GGUF file, a directory of shards or its index, in any layout that
            `rfkernels.formats.load` reads; the model must be one that `detect` knows.
        target: a safetensors file.
        to: "diffusers" or "original" names; by default those of the source, in the layout "native" those of
            diffusers.
        dtype: of floating tensors: float32, bfloat16 or float16. Quantised layers are decoded to it, unless
            there is a `method`.
        method: a format of `QuantLinear` for the weights of linear layers, by the rules of
            `rfkernels.quantize`, whose `skip`, `keep`, `modulation`, `min_size` and `options` these are.
            Patterns are of names of diffusers.
        layout: of quantised layers: "native" for `load_quantized`, "comfy" for ComfyUI.
        prefix: of all names that are written.
        metadata: strings of the header, beside those of the source.
        max_shard_bytes: as in `write_safetensors`.
        progress: called with the name of each tensor that was written.

    Returns:
        A report of every linear layer, as `rfkernels.quantize` makes it; an empty one without a method.

    Raises:
        ValueError: an unknown model; names that it does not have, parts of a tensor that are missing (named);
            quantised layers that cannot be put together; numbers that float16 cannot hold.
    """
    found = listing(source)
    architecture = detect(found)
    coded = any(map(_is_coded, found.dtypes.values()))
    quantised = method is not None or (dtype is None and coded)
    native_file = layout == "native" and quantised
    to = to or ("diffusers" if native_file else architecture.naming)
    _check(to, dtype, layout, native_file, prefix, architecture)
    choice = None
    if method is not None:
        more = {"modulation": modulation, "min_size": min_size, "options": options}
        choice = Choice.of(architecture.class_name, method, skip, keep, **more)
    elif options or modulation is not None:
        raise ValueError(f"convert: a method is required for {[*options] or ['modulation']}, got none")
    bare = {name.removeprefix(architecture.prefix): shape for name, shape in found.shapes.items()}
    names = _Names(architecture, to, keys_of(architecture.family, bare), method is None and dtype is None)
    planned = names.plan(found.shapes, coded)
    strings = {"format": "pt", **_strings(source, found), **(metadata or {})}
    room = header_room((prefix + name for name in planned), strings)
    room += sum(len(prefix + name) + _LEAF_ROOM for name in planned) * _LEAVES if quantised else 0
    coder = _Coder(choice, dtype, layout, names)
    with Writer(target, room, max_shard_bytes) as writer:
        for name, item in names.renamed(_items(source, architecture.prefix, dtype)):
            for full, tensor in coder.encoded(name, item):
                writer.add(prefix + full, tensor)
            if progress is not None:
                progress(name)
        writer.finish({**strings, **coder.header(architecture, prefix)})
    return coder.report(method or "")


def _check(to: str, dtype, layout: str, native_file: bool, prefix: str, found: Architecture) -> None:
    if to not in NAMINGS or layout not in LAYOUTS or dtype not in (None, *_DTYPES):
        required = f"names of {NAMINGS}, a layout of {LAYOUTS} and a dtype of {_DTYPES}"
        raise ValueError(f"convert: {required} are required, got {to!r}, {layout!r}, {dtype}")
    if native_file and (to != "diffusers" or prefix):
        got = f"those of {to!r}" + f" and the prefix {prefix!r}" * bool(prefix)
        raise ValueError(f"convert: the layout 'native' has names of diffusers, got {got}: 'comfy' has any")
    if to != found.naming and found.family in ("dit", "pixart"):
        required = f"names of {found.naming!r}, those of the file,"
        raise ValueError(f"convert: {required} are required for {found.family}, got {to!r}")


def _strings(source, found: Listing) -> dict[str, str]:
    """The strings of the header that stay true."""
    if _is_gguf(source):
        return {}
    return {key: text for key, text in found.metadata.items() if key not in (comfy.HEADER, native.KEY)}


def _is_coded(dtype: torch.dtype | str) -> bool:
    return dtype not in (*_DTYPES, torch.float64, torch.int64, torch.int32, "F32", "F16", "BF16")


def _is_gguf(source: str | Path | Mapping[str, Tensor]) -> bool:
    return isinstance(source, (str, Path)) and Path(source).is_file() and gguf.is_gguf(source)


def _items(source, prefix: str, dtype: torch.dtype | None) -> Iterator[tuple[str, Item]]:
    """What a file holds; layers as the weight of their name, their bias for itself."""
    checkpoint = source if _is_gguf(source) else open_checkpoint(source).without_prefix(prefix)
    for name, item in read(checkpoint, dtype or torch.bfloat16):
        name = name.removeprefix(prefix)
        if isinstance(item, QuantLinear):
            if item.bias is not None:
                yield f"{name}.bias", item.bias
            name, item = f"{name}.weight", item.with_bias(None)
        yield name, item


class _Names:
    """The names of a file in another naming; `keeps`: quantised layers stay so."""

    def __init__(self, found: Architecture, to: str, keys: Keys, keeps: bool):
        self._found, self._to, self.keys, self._keeps = found, to, keys, keeps

    def plan(self, shapes: Mapping[str, tuple[int, ...]], coded: bool) -> list[str]:
        """Upper bound of the names to be written; `coded`: layers may have leaves of quantisation.

        Raises:
            ValueError: names that the model does not have.
        """
        planned, unknown = [], []
        for full, shape in shapes.items():
            name = full.removeprefix(self._found.prefix)
            if self._is_dropped(name):
                continue
            match = self.keys.find(name, self._found.naming, shape[0] if shape else 0)
            if match is None and coded:
                layer = name.partition(".weight.")[0] if ".weight." in name else name.rpartition(".")[0]
                match = self.keys.find(f"{layer}.weight", self._found.naming)
            if match is not None and full.startswith(self._found.prefix):
                planned += match.parts if self._to == "diffusers" else [match.original]
            elif not (coded and name == "scaled_fp8"):
                unknown.append(full)
        if unknown:
            required = f"names of a {self._found.family} model in the {self._found.naming} naming"
            raise ValueError(f"convert: {required} are required, got {len(unknown)} others: {unknown[:6]}")
        return planned

    def diffusers(self, name: str) -> tuple[str, ...]:
        """The layers of diffusers whose weight a tensor of the result is."""
        match = self.keys.find(name, self._to)
        parts = match.parts if self._to == "original" else match.parts[match.index :][:1]
        return tuple(part.removesuffix(".weight") for part in parts)

    def _is_dropped(self, name: str) -> bool:
        return self._found.naming == "original" and is_dropped(self.keys.family, name)

    def renamed(self, items: Iterator[tuple[str, Item]]) -> Iterator[tuple[str, Item]]:
        """Tensors by their new names; parts of one wait for each other."""
        naming = self._found.naming
        waiting: dict[str, dict[int, Item]] = {}
        for name, item in items:
            if self._is_dropped(name):
                continue
            match = self.keys.find(name, naming, count_rows(item))
            if match is None:
                raise ValueError(
                    f"convert: {name} is no name of a {self.keys.family} model in the {naming} naming"
                )
            if naming == self._to:
                yield name, item
            elif naming == "original":
                yield from self._split(name, item, match)
            else:
                parts = waiting.setdefault(match.original, {})
                parts[match.index] = item
                if len(parts) == len(match.parts):
                    yield match.original, self._whole(match, waiting.pop(match.original))
        for original, parts in waiting.items():
            match = self.keys.find(original, "original")
            missing = [part for i, part in enumerate(match.parts) if i not in parts]
            raise ValueError(f"convert: {original} takes {list(match.parts)}, the file lacks {missing}")

    def _split(self, name: str, item: Item, match) -> Iterator[tuple[str, Item]]:
        rows = count_rows(item)
        if len(match.parts) == 1 and not match.swap:
            yield match.parts[0], item
            return
        start = 0
        for part, size in zip(match.parts, self.keys.rows(name, len(match.parts), rows), strict=True):
            yield part, take(item, start, start + size, match.swap)
            start += size

    def _whole(self, match, parts: dict[int, Item]) -> Item:
        items = [parts[index] for index in range(len(match.parts))]
        whole = join(items)
        if whole is None and not self._keeps:
            whole = torch.cat([decoded(item).float() for item in items])
        if whole is None:
            kinds = [item.format if isinstance(item, QuantLinear) else item.dtype for item in items]
            raise ValueError(f"convert: parts of {match.original} must be alike, got {kinds}; give a dtype")
        return take(whole, 0, count_rows(whole), match.swap) if match.swap else whole


def _cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    made = tensor.to(dtype)
    if dtype == torch.float16 and not made.isfinite().all() and tensor.isfinite().all():
        largest = tensor.abs().max().item()
        raise ValueError(f"convert: {name} must fit float16, got numbers to {largest:g}")
    return made


class _Coder:
    """Items as the tensors that are written, and what was done to them."""

    def __init__(self, choice: Choice | None, dtype: torch.dtype | None, layout: str, names: _Names):
        self._choice, self._dtype, self._layout, self._names = choice, dtype, layout, names
        self._settings: dict[str, dict] = {}
        self._entries: dict[str, Layer] = {}
        self._biases: dict[str, int] = {}

    def encoded(self, name: str, item: Item) -> Iterator[tuple[str, Tensor]]:
        layer, _, leaf = name.rpartition(".")
        dtype, linear = self._dtype, is_linear(name, item.ndim if isinstance(item, Tensor) else 2)
        if isinstance(item, QuantLinear):
            if self._choice is None and dtype is None and linear:
                yield from self._leaves(layer, item)
                return
            dtype, item = dtype or item.dtype, item.dequantized()
        tensor = _cast(name, item, dtype)
        if leaf == "bias":
            self._biases[layer] = tensor.nbytes
        if self._choice is None or not linear:
            yield name, tensor
            return
        format, reason = self._choice.format(self._names.diffusers(name), tensor)
        if format is None:
            self._note(layer, tensor, tensor.nbytes, reason=reason)
            yield name, tensor
            return
        made = quantize_weight(tensor, format, layer, **self._choice.options_of(format))
        coded = QuantLinear(format, dtype=tensor.dtype, **made)
        self._note(layer, tensor, coded.nbytes, format, *compare(tensor, coded))
        yield from self._leaves(layer, coded)

    def header(self, found: Architecture, prefix: str) -> dict[str, str]:
        settings = {prefix + layer: setting for layer, setting in self._settings.items()}
        if not settings:
            return {}
        if self._layout == "comfy":
            return comfy.header(settings)
        return native.header(found.class_name, settings, {})

    def report(self, method: str) -> Report:
        def whole(name: str, entry: Layer) -> Layer:
            before, after = (n + self._biases.get(name, 0) for n in (entry.bytes_before, entry.bytes_after))
            return replace(entry, bytes_before=before, bytes_after=after)

        return Report(method, [whole(name, entry) for name, entry in self._entries.items()])

    def _note(
        self, name: str, weight: Tensor, after: int, format: str = "high", *measures, reason=""
    ) -> None:
        snr, cosine = measures or (None, None)
        shape = tuple(weight.shape)
        self._entries[name] = Layer(name, format, shape, weight.nbytes, after, snr, cosine, reason)

    def _leaves(self, layer: str, coded: QuantLinear) -> Iterator[tuple[str, Tensor]]:
        if self._layout == "comfy":
            self._settings[layer] = comfy.tensors(coded)[1]
            leaves = comfy.marked_tensors(coded)
        else:
            self._settings[layer], leaves = coded.config(), coded.state_dict()
        yield from ((f"{layer}.{leaf}", tensor) for leaf, tensor in leaves.items())
