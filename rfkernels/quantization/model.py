"""`rfkernels.quantize`: the linear layers of a model, one after the other, in place."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from rfkernels.nn import QuantLinear
from rfkernels.quantization.int8 import check_finite
from rfkernels.quantization.report import Layer, Report, compare
from rfkernels.quantization.rules import Choice, matches

__all__ = ["choose", "quantize", "replace"]


def quantize(
    model: nn.Module,
    method: str,
    *,
    skip: Sequence[str] = (),
    keep: Sequence[str] | None = None,
    modulation: str | None = None,
    min_size: int = 1 << 14,
    progress: Callable[[Layer], None] | None = None,
    **options: Any,
) -> Report:
    """Replaces `nn.Linear` layers of a model by `rfkernels.nn.QuantLinear`, in place and without calibration.

    Layer by layer: beside the model there is never more than one layer, of its float32 size (svdq-int4: up
    to two of float64).

    Args:
        model: on any device. Its norms, convolutions, tables and biases stay.
        method: "int8", "int8-convrot", "fp8", "w4a16", "w4a8" or "svdq-int4" (`QuantLinear`).
        skip: patterns (`fnmatch`) of layer names that stay as they are, beside those of `keep`.
        keep: patterns of layers too sensitive to quantise; by default those of the model's class
            (`rfkernels/quantization/rules.py`): embedders and last projections. `()` keeps none.
        modulation: the format of linears that make scales, shifts and gates; by default they stay. "w4a16"
            suits them: they read one row a sample, so that their bytes are what they cost.
        min_size: layers with fewer weights stay.
        progress: called after each layer.
        options: of the method, as in `QuantLinear.from_linear`.

    Returns:
        A report of every linear layer: format, signal-to-noise ratio, cosine, bytes; `print` it.

    Raises:
        ValueError: an unknown method, a layer that is quantised already, a weight with a NaN or an infinity
            (the layer is named); the model is as it was then.
    """
    _refuse_quantized(model, skip)
    sites = choose(model, method, skip, keep, modulation, min_size, options)
    for site in sites:
        if site.format is not None:
            check_finite(site.weight, site.names[0])
    report = Report(method)
    while sites:
        site = sites.pop(0)  # its weight goes with it
        for entry in site.run(model, options if site.format == method else {}):
            report.layers.append(entry)
            if progress is not None:
                progress(entry)
    return report


def choose(
    model: nn.Module,
    method: str,
    skip: Sequence[str],
    keep: Sequence[str] | None,
    modulation: str | None,
    min_size: int,
    options: dict[str, Any],
) -> list["Site"]:
    """The weights of all linear layers and the format of each, arguments as of `quantize`; no weight is read.

    Raises:
        ValueError: an unknown method.
    """
    choice = Choice.of(model, method, skip, keep, modulation=modulation, min_size=min_size, options=options)
    sites = _sites(model)
    for site in sites:
        site.choose(choice)
    return sites


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the submodule `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


@dataclass
class Site:
    """A weight: its layers, by name, and what becomes of them."""

    weight: nn.Parameter
    places: dict[str, nn.Linear]
    tied: str = ""  # a place of the weight that is no linear layer
    format: str | None = None
    reason: str = ""

    @property
    def names(self) -> list[str]:
        return list(self.places)

    def choose(self, choice: Choice) -> None:
        """Sets the format, or the reason why there is none."""
        self.format, self.reason = choice.format(self.names, self.weight)
        kinds = {type(linear) for linear in self.places.values()} - {nn.Linear}
        if (kinds or self.tied) and not any(matches(name, choice.high) for name in self.names):
            self.reason = f"kept: tied to {self.tied}" if self.tied else f"kept: a {kinds.pop().__name__}"
            self.format = None

    def run(self, model: nn.Module, options: dict) -> Iterator[Layer]:
        """Replaces the layers. The weight is counted with the first, a layer under two names once."""
        shape, first, measures, made = tuple(self.weight.shape), None, (None, None), {}
        for name, linear in self.places.items():
            before = 0 if linear.bias is None or id(linear) in made else linear.bias.nbytes
            layer = made.get(id(linear), linear)
            if self.format is not None and first is None:
                layer = QuantLinear.from_linear(linear, self.format, name=name, **options)
                measures = compare(self.weight.detach(), layer)
            elif self.format is not None and id(linear) not in made:
                layer = first.with_bias(linear.bias)
            after = layer.nbytes if first is None and layer is not linear else before
            if first is None:
                before += self.weight.nbytes
                after = before if layer is linear else after
            if layer is not linear:
                replace(model, name, layer)
            reason = self.reason or (f"tied to {self.names[0]}" if first else "")
            first, made[id(linear)] = first or layer, layer
            yield Layer(name, self.format or "high", shape, before, after, *measures, reason)


def _sites(model: nn.Module) -> list[Site]:
    """The weights of all linear layers, in the order of the model."""
    sites: dict[int, Site] = {}
    owners = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            sites.setdefault(id(module.weight), Site(module.weight, {})).places[name] = module
        else:
            owners.update(
                {id(p): f"{name}.{leaf}" for leaf, p in module._parameters.items() if p is not None}
            )
    if any("" in site.places for site in sites.values()):
        raise ValueError("quantize: a model with layers is required, got one layer: QuantLinear.from_linear")
    for key, site in sites.items():
        site.tied = owners.get(key, "")
    return list(sites.values())


def _refuse_quantized(model: nn.Module, skip: Sequence[str]) -> None:
    modules = ((n, m) for n, m in model.named_modules() if isinstance(m, QuantLinear))
    for name, module in modules:
        if not matches(name, tuple(skip)):
            raise ValueError(
                f"quantize: layers must not be quantised yet, got {name} in {module.format}; "
                "quantise the original model, or skip the layer"
            )
