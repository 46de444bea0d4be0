"""What a quantisation did: one line a layer, totals, as a table and as JSON."""

import json
import math
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from rfkernels.nn import QuantLinear

__all__ = ["Layer", "Report", "compare"]


@dataclass(frozen=True)
class Layer:
    """One linear layer: `format` "high" where it stayed, then `reason` says why and the measures are
    absent."""

    name: str
    format: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    snr_db: float | None = None
    cosine: float | None = None
    reason: str = ""


@dataclass
class Report:
    """Layers in the order of the model. `print(report)` is a table."""

    method: str
    layers: list[Layer] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        """Of all linear layers, biases included."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def worst(self) -> Layer | None:
        """The layer with the lowest signal-to-noise ratio."""
        measured = [layer for layer in self.layers if layer.snr_db is not None]
        return min(measured, key=lambda layer: layer.snr_db, default=None)

    def __getitem__(self, name: str) -> Layer:
        return next(layer for layer in self.layers if layer.name == name)

    def to_json(self) -> str:
        totals = {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        layers = [asdict(layer) for layer in self.layers]
        return json.dumps({"method": self.method, "totals": totals, "layers": layers}, indent=1)

    def __str__(self) -> str:
        width = max([5, *(len(layer.name) for layer in self.layers)])
        lines = [f"{'layer':{width}}  {'format':12}  SNR dB   cosine        bytes"]
        for layer in self.layers:
            measures = " " * 15 if layer.snr_db is None else f"{layer.snr_db:6.1f}  {layer.cosine:.5f}"
            parts = f"{layer.format:12}  {measures}  {layer.bytes_after:10,}  {layer.reason}"
            lines.append(f"{layer.name:{width}}  {parts}".rstrip())
        kept = sum(layer.format == "high" for layer in self.layers)
        part = self.bytes_after / max(1, self.bytes_before)
        lines.append(
            f"{len(self.layers)} linear layers, {kept} of them as they were: "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes ({part:.0%})"
        )
        return "\n".join(lines)


def compare(weight: Tensor, layer: QuantLinear) -> tuple[float, float]:
    """Signal-to-noise ratio in dB, and cosine, of a weight and what a layer stores of it, in pieces of rows.

    inf and 1 where they are equal.
    """
    signal = noise = product = energy = 0.0
    pieces = torch.arange(len(weight), device=weight.device).split(max(1, (1 << 18) // weight.shape[1]))
    for rows in pieces:
        a, b = weight[rows].double(), layer.take_rows(rows).dequantized().double()
        signal, noise = signal + a.square().sum().item(), noise + (a - b).square().sum().item()
        product, energy = product + (a * b).sum().item(), energy + b.square().sum().item()
    if noise == 0:
        return math.inf, 1.0
    return 10 * math.log10(max(signal, 1e-300) / noise), product / max(math.sqrt(signal * energy), 1e-300)
