"""The layers of a transformer and their work, from the names and shapes of its tensors."""

import re
from collections import Counter
from dataclasses import dataclass

from torch import nn

from rfkernels.memory.header import Entry
from rfkernels.quantization.rules import matches, rules_of

__all__ = ["FORMATS", "LayerShape", "ModelShape", "Work", "model_shape"]

_RULES = rules_of(nn.Module())
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "net.")
_OTHER_MODELS = re.compile(
    r"^(text_encoders?|first_stage_model|conditioner|cond_stage_model|vae|te\d?|clip_[lg]|t5xxl)\."
)
_CROSS = re.compile(r"(attn2|cross_attn)\.")
_TEXT_STREAM = re.compile(r"(^|[._])(add_|txt|context)|_t(\.|$)")
_KEYS_VALUES = re.compile(r"\.(to_)?[kv][._]|add_|kv")
_TEXT_INPUT = re.compile(r"txt|text|context|caption|cap_|llama")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_ACTIVE_EXPERTS = 2
_SMALLEST = 1 << 14  # numbers of a matrix that `rfkernels.quantize` takes


def _four_bits(out: int, width: int, extra: int) -> int:
    return out * width // 2 + out * (width // 64) * extra


FORMATS = {  # bytes of a matrix [out, in] as `QuantLinear` stores it, of 16-bit weights and in groups of 64
    "int8": lambda out, width: out * width + 4 * out,
    "int8-convrot": lambda out, width: out * width + 4 * out,
    "fp8": lambda out, width: out * width + 4 * out,
    "w4a16": lambda out, width: _four_bits(out, width, 4),
    "w4a8": lambda out, width: _four_bits(out, width, 2),
    "svdq-int4": lambda out, width: _four_bits(out, width, 2) + 2 * 32 * (out + width) + 2 * width,
}


@dataclass(frozen=True)
class Work:
    """Operations of a forward pass."""

    linear: float = 0
    attention: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.linear + other.linear, self.attention + other.attention)


@dataclass(frozen=True)
class _Matrix:
    """A weight of a linear layer, `[out, in]`, by the name it has within its layer."""

    name: str
    out: int
    width: int
    nbytes: int
    floating: bool

    @property
    def modulates(self) -> bool:
        """Whether it makes scales and gates, from one row a sample."""
        return matches(f".{self.name}".removesuffix(".weight"), _RULES.modulation)

    @property
    def embeds(self) -> bool:
        return "embed" in self.name

    @property
    def crosses(self) -> bool:
        """Whether it is of a second attention."""
        return bool(_CROSS.search(self.name))

    @property
    def of_text(self) -> bool:
        """Whether it is of a stream of text tokens."""
        return not self.crosses and bool(_TEXT_STREAM.search(self.name))

    def bytes_in(self, format: str | None, modulation: str | None) -> int:
        chosen = None if self.embeds else modulation if self.modulates else format
        fits = self.floating and self.out * self.width >= _SMALLEST and self.width % 64 == 0
        return FORMATS[chosen](self.out, self.width) if chosen and fits else self.nbytes


@dataclass(frozen=True)
class LayerShape:
    """A layer: its matrices, and the bytes of its other tensors."""

    name: str
    matrices: tuple[_Matrix, ...]
    other_bytes: int

    def nbytes(self, format: str | None = None, modulation: str | None = None) -> int:
        return self.other_bytes + sum(m.bytes_in(format, modulation) for m in self.matrices)

    def work(self, width: int, tokens: int, text: int, batch: int) -> Work:
        """Of a forward pass: 2 for each weight and row; 4 n^2 D for attention over n tokens.

        Layers with a text stream have separate weights for it and one attention over all tokens; those with
        cross-attention have tokens alone in the first, text for keys and values in the second; all others
        have all tokens in one row.
        """
        crosses = any(m.crosses for m in self.matrices)
        streams = any(m.of_text for m in self.matrices)
        if "context_refiner" in self.name:
            tokens, text = text, 0
        elif "refiner" in self.name:
            text = 0
        together = tokens if crosses and not streams else tokens + text
        linear = 0.0
        for m in self.matrices:
            if m.modulates or m.embeds:
                rows = 1
            elif streams:
                rows = text if m.of_text else tokens
            else:
                rows = text if m.crosses and _KEYS_VALUES.search(m.name) else together
            linear += 2 * m.out * m.width * rows * self._part(m)
        attention = 4.0 * width * together**2
        if crosses:  # beside text streams the second attention is over the image alone
            attention += 4.0 * width * tokens * (tokens if streams else text)
        return Work(batch * linear, batch * attention)

    def _part(self, matrix: _Matrix) -> float:
        """Of the rows that a matrix sees: experts share them."""
        if not _EXPERT.search(f".{matrix.name}"):
            return 1.0
        experts = {_EXPERT.search(f".{m.name}")[1] for m in self.matrices if _EXPERT.search(f".{m.name}")}
        return min(1.0, _ACTIVE_EXPERTS / len(experts))


@dataclass(frozen=True)
class ModelShape:
    """A transformer: its layers in order, and the rest of it.

    Attributes:
        width: of its tokens, D.
        widest: inputs and outputs of its largest matrices that see tokens.
        text: whether text tokens go through its layers.
        rest_bytes: of tensors outside the layers.
        other_models: bytes of text encoders and decoders in the same file.
    """

    layers: tuple[LayerShape, ...]
    width: int
    widest: tuple[int, int]
    text: bool
    rest_bytes: int
    other_models: int

    def nbytes(self, format: str | None = None, modulation: str | None = None) -> int:
        return self.rest_bytes + sum(layer.nbytes(format, modulation) for layer in self.layers)

    def work(self, tokens: int, text: int, batch: int) -> list[Work]:
        """Of each layer."""
        return [layer.work(self.width, tokens, text if self.text else 0, batch) for layer in self.layers]


def model_shape(entries: list[Entry]) -> ModelShape:
    """The layers among the tensors of a checkpoint: modules numbered from 0 that hold several
    matrices.

    Raises:
        ValueError: none are found.
    """
    own = [e for e in entries if not _OTHER_MODELS.match(e.name)]
    prefix = next((p for p in _PREFIXES if own and all(e.name.startswith(p) for e in own)), "")
    layers, rest = _grouped([e._replace(name=e.name.removeprefix(prefix)) for e in own])
    if not layers:
        raise ValueError(
            "plan: a transformer with numbered layers of matrices [out, in] (blocks.0 .., layers.0 ..) is "
            f"required, got names like {[e.name for e in entries[:3]]}"
        )
    seeing = [m for layer in layers for m in layer.matrices if not (m.modulates or m.embeds)]
    if not seeing:
        raise ValueError(f"plan: layers with matrices are required, got none in {layers[0].name}")
    sizes = Counter(size for m in seeing for size in (m.out, m.width))
    width = min(sizes, key=lambda size: (-sizes[size], size))
    return ModelShape(
        tuple(layers),
        width,
        (max(m.width for m in seeing), max(m.out for m in seeing)),
        any(_TEXT_INPUT.search(e.name) for e in rest),
        sum(e.nbytes for e in rest),
        sum(e.nbytes for e in entries) - sum(e.nbytes for e in own),
    )


def _grouped(entries: list[Entry]) -> tuple[list[LayerShape], list[Entry]]:
    """Layers in the order of their use, and the tensors that belong to none."""
    groups: dict[str, dict[int, list[Entry]]] = {}
    for entry in entries:
        found = re.match(r"(.*?)\.(\d+)\.(.+)", entry.name)
        if found:
            groups.setdefault(found[1], {}).setdefault(int(found[2]), []).append(entry)
    layers: list[LayerShape] = []
    inside: set[str] = set()
    for name in sorted(groups, key=lambda name: ("single" in name) - ("refiner" in name)):
        group = [_layer(f"{name}.{i}", entries) for i, entries in sorted(groups[name].items())]
        ordered = sorted(groups[name]) == list(range(len(group)))
        deep = min(len(layer.matrices) for layer in group) > 1
        if ordered and deep:
            layers += group
            inside |= {entry.name for entries in groups[name].values() for entry in entries}
    return layers, [e for e in entries if e.name not in inside]


def _layer(name: str, entries: list[Entry]) -> LayerShape:
    matrices, others = [], 0
    for entry in entries:
        leaf = entry.name.rpartition(".")[2]
        if len(entry.shape) != 2 or leaf not in ("weight", "qweight") or min(entry.shape) == 1:
            others += entry.nbytes
            continue
        packed = leaf == "qweight" or entry.dtype == "U8"  # two numbers in a byte
        out, width = entry.shape[0], entry.shape[1] * (2 if packed else 1)
        floating = entry.dtype in ("F64", "F32", "F16", "BF16")
        matrices.append(_Matrix(entry.name[len(name) + 1 :], out, width, entry.nbytes, floating))
    return LayerShape(name, tuple(matrices), others)
