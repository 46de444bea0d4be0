"""What fits where, and how long a step must take, before anything is loaded."""

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rfkernels.memory.boards import Board, board
from rfkernels.memory.header import read_entries
from rfkernels.memory.residency import device_bytes, streamed_layers
from rfkernels.memory.shape import FORMATS, ModelShape, Work, model_shape

__all__ = ["MemoryPlan", "plan", "read_bytes"]

OVERHEAD = 600 << 20  # of a CUDA context, libraries and their workspaces
LINK_SHARE = 0.8  # of the rate of a PCIe link, 25 of 31.5 GB/s for 4.0 x16
_ACTIVATION = 2  # bytes of a number
_PIXELS = 16  # of a token, each way: 8 of the decoder, 2 of a patch
_KINDS = {"fp8": "fp8", "int8": "int8", "int8-convrot": "int8", "w4a8": "int8", "svdq-int4": "int8"}
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_UNITS |= {f"{unit}ib": _UNITS[unit] for unit in "kmgt"}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass(frozen=True)
class MemoryPlan:
    """Where a model goes. `print(plan)` is a table, `to_json()` the same for programs.

    Attributes:
        fits: whether it does; `missing` bytes otherwise, and `advice`.
        layers, layer_bytes: names and bytes, in order; `streamed`: the names of those that do not stay.
        resident_bytes: of layers that stay; slot_bytes: for those that come and go.
        rest_bytes: of embedders, norms and projections outside the layers.
        activation_bytes, overhead_bytes: of what a step makes, and of CUDA itself.
        device_bytes: the sum; host_bytes: page-locked, of streamed layers.
        format_bytes: of the whole model, as stored and in each format.
        flop: of a step. compute_s, memory_s, link_s: what arithmetic, reading weights and copying layers take
            at the rates of the board; step_s: no step is faster, None without a board
            and where it does not fit.
        assumptions: one line each.
    """

    model: str
    gpu: str | None
    quant: str | None
    modulation: str | None
    tokens: int
    text_tokens: int
    batch: int
    steps: int
    vram: int
    fits: bool
    missing: int
    advice: str
    layers: tuple[str, ...]
    layer_bytes: tuple[int, ...]
    streamed: tuple[str, ...]
    ahead: int
    resident_bytes: int
    slot_bytes: int
    rest_bytes: int
    activation_bytes: int
    overhead_bytes: int
    device_bytes: int
    host_bytes: int
    format_bytes: dict[str, int]
    flop: float
    compute_s: float | None
    memory_s: float | None
    link_s: float | None
    step_s: float | None
    assumptions: tuple[str, ...]

    @property
    def layer_budget(self) -> int:
        """What the device has for layers: `resident_bytes` of `stream_layers`."""
        return self.vram - self.rest_bytes - self.activation_bytes - self.overhead_bytes

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        stay, all_ = len(self.layers) - len(self.streamed), len(self.layers)
        where = f" on {self.gpu}" if self.gpu else ""
        text = f" and {self.text_tokens} of text" if self.text_tokens else ""
        format = self.quant or "as stored"
        format += f" (modulation {self.modulation})" if self.modulation else ""
        lines = [
            f"{self.model}{where}: {format}, {self.tokens} tokens{text}, batch {self.batch}",
            f"  {'layers that stay':24} {_size(self.resident_bytes):>10}   {stay} of {all_}",
        ]
        if self.streamed:
            slots = f"{len(self.streamed)} layers in turn, {self.ahead} ahead"
            lines.append(f"  {'slots':24} {_size(self.slot_bytes):>10}   {slots}")
        lines += [
            f"  {'rest of the model':24} {_size(self.rest_bytes):>10}",
            f"  {'activations':24} {_size(self.activation_bytes):>10}   estimate",
            f"  {'CUDA':24} {_size(self.overhead_bytes):>10}   estimate",
            f"  {'device':24} {_size(self.device_bytes):>10}   of {_size(self.vram)}"
            + ("" if self.fits or self.device_bytes <= self.vram else f": {_size(self.missing)} too little"),
        ]
        if self.streamed:
            lines.append(f"  {'host, page-locked':24} {_size(self.host_bytes):>10}")
        formats = ", ".join(f"{name} {_size(n)}" for name, n in self.format_bytes.items())
        lines.append(f"  {'the model':24} {formats} (modulation in w4a16)")
        if self.step_s is not None:
            parts = [("arithmetic", self.compute_s), ("weights", self.memory_s), ("copies", self.link_s)]
            named = ", ".join(f"{name} {_time(s)}" for name, s in parts if s)
            total = f"{self.steps} steps {_time(self.step_s * self.steps)}"
            lines.append(f"  {'a step, at best':24} {_time(self.step_s):>10}   {named}; {total}")
        lines += [f"  {line}" for line in ([] if self.fits else [f"does not fit: {self.advice}"])]
        return "\n".join([*lines, *(f"  - {line}" for line in self.assumptions)])


def plan(
    source: str | Path,
    *,
    vram: int | str | None = None,
    ram: int | str | None = None,
    gpu: str | Board | None = None,
    tokens: int | None = None,
    resolution: tuple[int, int] | str | None = None,
    text_tokens: int = 512,
    batch: int = 1,
    quant: str | None = None,
    modulation: str | None = None,
    steps: int = 28,
    ahead: int = 1,
) -> MemoryPlan:
    """Plans a run of a transformer from the header of its file: no tensor is read, no GPU is needed.

    Activations of a layer: 2 bytes for each token times (2 D + widest input + widest output of a matrix): the
    tokens, their norm, and both ends of the largest product. Scores of attention are not kept.

    Args:
        source: a safetensors or GGUF file, an index of shards, or a folder with one of them.
        vram, ram: free bytes on the device and of the host, as a number or like "8G" (GiB) or "8GB"; vram is
            by default all of the board, ram is not limited.
        gpu: a name of `BOARDS`; without it no times are told.
        tokens: of the image or video, or by resolution (width, height) or "1024x1024": one for 16 x 16
            pixels; by default 1024 x 1024.
        text_tokens: beside them, where the model has text.
        batch: samples a forward pass: 2 for one picture with classifier-free guidance.
        quant, modulation: formats of linear layers, as in `rfkernels.quantize`; by default as stored.
        steps: of a picture, in the printed total.
        ahead: layers copied while another runs, where not all fit.

    Raises:
        FileNotFoundError, ValueError: of `read_entries` and `model_shape`; an unknown board or format, sizes
            that are none, both of tokens and resolution.
    """
    for name, format in (("quant", quant), ("modulation", modulation)):
        if format is not None and format not in FORMATS:
            raise ValueError(f"plan: {name} must be one of {', '.join(FORMATS)}, got {format!r}")
    chosen = board(gpu) if isinstance(gpu, str) else gpu
    if vram is None and chosen is None:
        raise ValueError("plan: vram or a gpu is required, got neither")
    if min(batch, steps) < 1 or min(text_tokens, ahead) < 0:
        raise ValueError(
            "plan: batch and steps of at least 1, text_tokens and ahead of at least 0 are required, got "
            f"{batch}, {steps}, {text_tokens} and {ahead}"
        )
    shape = model_shape(read_entries(source))
    job = _Job(
        Path(source).name or str(source),
        shape,
        chosen,
        chosen.memory if vram is None else read_bytes(vram),
        None if ram is None else read_bytes(ram),
        _tokens(tokens, resolution),
        text_tokens if shape.text else 0,
        batch,
        steps,
        ahead,
        tuple(_assumptions(chosen, vram, tokens, quant, shape)),
    )
    found = job.plan(quant, modulation)
    if found.fits:
        return found
    smaller = (job.plan(format, "w4a16") for format in ("int8-convrot", "w4a16"))
    better = next((p for p in smaller if p.fits), None)
    words = "no format makes it fit: a larger device or fewer tokens"
    if better is not None:
        words = f"quant={better.quant!r}, modulation='w4a16' takes {_size(better.device_bytes)}"
        words += (
            f", {len(better.streamed)} of {len(better.layers)} layers streamed" if better.streamed else ""
        )
    return replace(found, advice=f"{found.advice}; {words}")


@dataclass(frozen=True)
class _Job:
    """All that a plan is made of but the formats."""

    model: str
    shape: ModelShape
    board: Board | None
    vram: int
    ram: int | None
    tokens: int
    text: int
    batch: int
    steps: int
    ahead: int
    assumptions: tuple[str, ...]

    def plan(self, quant: str | None, modulation: str | None) -> MemoryPlan:
        shape = self.shape
        sizes = [layer.nbytes(quant, modulation) for layer in shape.layers]
        wide = 2 * shape.width + sum(shape.widest)
        activations = _ACTIVATION * self.batch * (self.tokens + self.text) * wide
        fixed = shape.rest_bytes + activations + OVERHEAD
        unified = self.board is not None and self.board.unified
        moving = streamed_layers(sizes, ahead=self.ahead, budget=self.vram - fixed)
        missing, advice = 0, ""
        if moving is None or (unified and moving):
            moving = () if unified else tuple(range(len(sizes)))
            missing = fixed + device_bytes(sizes, moving, self.ahead) - self.vram
            advice = f"{_size(missing)} of the device are missing"
            advice += ", and its memory is the host's: layers have nowhere else to be" if unified else ""
        host = sum(sizes[i] for i in moving)
        if self.ram is not None and host > self.ram and not missing:
            missing = host - self.ram
            advice = f"{_size(missing)} of the host's memory are missing for streamed layers"
        used = device_bytes(sizes, moving, self.ahead)
        resident = sum(sizes) - host
        work = shape.work(self.tokens, self.text, self.batch)
        total = sum(work, Work())
        board = None if missing else self.board
        times = self._times(board, quant, work, sizes, host)
        return MemoryPlan(
            model=self.model,
            gpu=self.board.name if self.board else None,
            quant=quant,
            modulation=modulation,
            tokens=self.tokens,
            text_tokens=self.text,
            batch=self.batch,
            steps=self.steps,
            vram=self.vram,
            fits=not missing,
            missing=missing,
            advice=advice,
            layers=tuple(layer.name for layer in shape.layers),
            layer_bytes=tuple(sizes),
            streamed=tuple(shape.layers[i].name for i in moving),
            ahead=self.ahead,
            resident_bytes=resident,
            slot_bytes=used - resident,
            rest_bytes=shape.rest_bytes,
            activation_bytes=activations,
            overhead_bytes=OVERHEAD,
            device_bytes=fixed + used,
            host_bytes=host,
            format_bytes={"as stored": shape.nbytes()}
            | {name: shape.nbytes(name, "w4a16") for name in ("int8-convrot", "w4a16")},
            flop=total.linear + total.attention,
            assumptions=self.assumptions,
            **times,
        )

    def _times(
        self, board: Board | None, quant: str | None, work: list[Work], sizes: list[int], host: int
    ) -> dict[str, Any]:
        """Of a step: the layers one after the other, the copies beside them."""
        if board is None:
            return dict.fromkeys(("compute_s", "memory_s", "link_s", "step_s"))
        linear, full = board.peak(_KINDS.get(quant, "bf16")), board.peak("bf16")
        compute = [w.linear / linear + w.attention / full for w in work]
        memory = [size / board.bandwidth for size in sizes]
        link = host / (LINK_SHARE * board.link) if host else 0.0
        running = sum(map(max, compute, memory)) + self.shape.rest_bytes / board.bandwidth
        return {
            "compute_s": sum(compute),
            "memory_s": sum(memory),
            "link_s": link,
            "step_s": max(running, link),
        }


def _assumptions(board: Board | None, vram, tokens, quant, shape: ModelShape):
    if tokens is None:
        yield f"one token for {_PIXELS} x {_PIXELS} pixels"
    formula = "2 bytes x batch x tokens x (2 D + widest input + widest output)"
    yield f"activations: {formula}, D = {shape.width}"
    yield f"CUDA and its libraries take {_size(OVERHEAD)}"
    if quant is not None:
        tokens_too = " with quantize_input" if quant == "fp8" else ""
        yield f"linear layers within the layers are quantised{tokens_too}; the rest is as stored"
    if shape.other_models:
        yield f"text encoders and decoders in the file, {_size(shape.other_models)}, are not on the device"
    if board is None:
        return
    if vram is None:
        yield f"all of the {_size(board.memory)} are free: a desktop takes its part"
    peaks = ", ".join(f"{kind} {rate / 1e12:g}" for kind, rate in board.peaks.items())
    yield f"{board.name}: {peaks} dense TFLOP/s, {board.bandwidth / 1e9:g} GB/s ({board.source})"
    if not board.unified:
        yield f"copies at {LINK_SHARE * board.link / 1e9:.1f} GB/s, {LINK_SHARE:g} of the PCIe link"
    yield "attention, and linear layers of 16-bit tokens, at the rate of bf16; only matrix products count"


def _tokens(tokens: int | None, resolution: tuple[int, int] | str | None) -> int:
    if tokens is not None and resolution is not None:
        raise ValueError(f"plan: tokens or a resolution is required, got both: {tokens} and {resolution}")
    if tokens is None:
        size = (1024, 1024) if resolution is None else resolution
        if isinstance(size, str):
            found = re.fullmatch(r"(\d+)\s*[xX]\s*(\d+)", size.strip())
            size = tuple(map(int, found.groups())) if found else ()
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"plan: the resolution must be width x height in pixels, got {resolution!r}")
        tokens = math.ceil(size[0] / _PIXELS) * math.ceil(size[1] / _PIXELS)
    if tokens < 1:
        raise ValueError(f"plan: at least one token is required, got {tokens}")
    return tokens


def read_bytes(size: int | str) -> int:
    """A number of bytes, also as "8G", "7.5GiB" (2^30) or "8GB" (10^9).

    Raises:
        ValueError: none of these, or not positive.
    """
    found = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", str(size).strip())
    try:
        number = float(found[1]) * _UNITS[found[2].lower()] if found else 0
    except (ValueError, KeyError):
        number = 0
    if number < 1:
        raise ValueError(f"plan: a size like 8G, 7.5GiB or 8GB is required, got {size!r}")
    return int(number)


def _size(nbytes: float) -> str:
    return f"{nbytes / (1 << 30):.2f} GiB" if nbytes >= 1 << 27 else f"{nbytes / (1 << 20):.1f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds * 1e3:.0f} ms"
