"""What `accelerate` did to a model, by region: which ops ran where, or why not and what changes that."""

import re
from collections import Counter
from itertools import groupby
from typing import Any

import torch
from torch import nn

from rfkernels import diagnosis
from rfkernels.integrations.accelerate import Accelerated, Site, accelerated, forwards, transformers_of
from rfkernels.nn import LoRALinear, QuantLinear

__all__ = ["ModelExplanation", "explain_model"]

FIXES = (  # of reasons, by pattern
    (r"processor is ", "give the model its default processors (unload adapters of images), accelerate again"),
    (r"has a hook", "put the hook on the block, or on its linear layers"),
    (r"offloaded layer by layer", "offload whole blocks or models instead, or accelerate(..., vram=...)"),
    (r"was given", "leave the argument out"),
    (r"one of .* precision|has the processor", "give the model processors of diffusers, accelerate again"),
)
COLUMNS = ("region", "runs", "what", "instead")


class ModelExplanation(dict[str, Any]):
    """The record of `explain(obj)`: "models", a list; `print` shows tables."""

    def __str__(self) -> str:
        return "\n\n".join(_table(model) for model in self["models"])


def explain_model(obj: Any) -> ModelExplanation:
    """What runs in a pipeline or model of diffusers, accelerated or not: a dict that `json` can write.

    Each of "models" has `name`, `model` (its class), `accelerated`, and `rows` with `region`, `runs` (the
    back end, or who else), `what` (the ops, or the reason) and `instead` (what would change it).

    Raises:
        TypeError: an object without a transformer.
    """
    models = transformers_of(obj)
    if not models:
        raise TypeError(f"explain: a pipeline or a model is required, got {type(obj).__name__} without one")
    return ModelExplanation(models=[_explained(name, model) for name, model in models.items()])


def _explained(name: str, model: nn.Module) -> dict[str, Any]:
    state = accelerated(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    back_end = _back_end(device)
    if type(model).__module__.startswith("rfkernels."):
        rows = [_row("all blocks", back_end, "a model of rfkernels")]
    elif state is None:
        rows = [_row("all blocks", "diffusers", "not accelerated", "rfkernels.accelerate(...)")]
    else:
        rows = [row for group in _groups(state) for row in _block_rows(*group, back_end)]
        rows.append(_attention_row(state, back_end))
    rows += [_layer_row(model), _adapter_row(model, state), _graph_row(state, device)]
    return {
        "name": name,
        "model": type(model).__name__,
        "accelerated": state is not None,
        "rows": [row for row in rows if row is not None],
    }


def _row(region: str, runs: str, what: str, instead: str = "") -> dict[str, str]:
    return dict(zip(COLUMNS, (region, runs, what, instead), strict=True))


def _back_end(device: torch.device) -> str:
    """Who computes on a device, as `rfkernels.explain()` has it."""
    report = diagnosis.explain()
    row = next(iter(report["ops"]), None)
    if row is None:
        return "nothing: the kernels do not load"
    return row["cpu"] if device.type == "cpu" else row["cuda"]


def _groups(state: Accelerated) -> list[tuple[str, list[Site]]]:
    """Neighbours of one class and fate: `blocks.0-18` and their sites."""

    def key(item: tuple[str, Site]) -> tuple:
        path, site = item
        stem = re.sub(r"\d+", "#", path)
        return stem, type(site.block).__name__, site.refusal, tuple(site.declined), site.calls > 0

    found = []
    for (stem, *_), items in groupby(state.sites.items(), key):
        paths, sites = zip(*items, strict=True)
        numbers = [re.findall(r"\d+", path)[0] for path in (paths[0], paths[-1]) if "#" in stem]
        span = "-".join(dict.fromkeys(numbers))
        found.append((stem.replace("#", span, 1), list(sites)))
    return found


def _block_rows(region: str, sites: list[Site], back_end: str) -> list[dict[str, str]]:
    name = type(sites[0].block).__name__
    if sites[0].refusal is not None:
        return [_row(region, "diffusers", f"{name}: {sites[0].refusal}", _fix(sites[0].refusal))]
    calls, declined = sum(site.calls for site in sites), sum((s.declined for s in sites), Counter())
    devices = " ".join(sorted({site.device for site in sites if site.device}))
    where = f"{back_end}, {calls} calls on {devices}" if calls else f"{back_end}, not called yet"
    rows = [_row(region, where, f"{name}: {', '.join(forwards()[name].regions)}")]
    rows += [_row("", f"diffusers, {n} calls", reason, _fix(reason)) for reason, n in declined.items()]
    return rows


def _fix(reason: str) -> str:
    return next((fix for pattern, fix in FIXES if re.search(pattern, reason)), "")


def _attention_row(state: Accelerated, back_end: str) -> dict[str, str]:
    if state.attention_refusal is not None:
        reason = f"in blocks of ours {state.attention}; elsewhere diffusers': {state.attention_refusal}"
        return _row("attention", back_end, reason, _fix(state.attention_refusal))
    return _row("attention", back_end, f"precision {state.attention}")


def _layer_row(model: nn.Module) -> dict[str, str]:
    plain, formats = Counter(), Counter()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            formats[module.format] += 1
        elif isinstance(module, nn.Linear):
            plain[str(module.weight.dtype).removeprefix("torch.")] += 1
    parts = [f"{n} of {format}: linear" for format, n in formats.items()]
    parts += [f"{n} of {dtype}: torch" for dtype, n in plain.items()]
    instead = "" if formats else 'accelerate(..., quant="int8-convrot")'
    return _row("linear layers", "", ", ".join(parts) or "none", instead)


def _adapter_row(model: nn.Module, state: Accelerated | None) -> dict[str, str] | None:
    ours = sum(isinstance(m, LoRALinear) for m in model.modules())
    peft = sum(type(m).__module__.startswith("peft.") and hasattr(m, "lora_A") for m in model.modules())
    if ours:
        return _row("adapters", "", f"beside {ours} layers, in the epilogue of their products")
    if peft:
        instead = "rfkernels.load_lora: in the epilogue of the product"
        return _row("adapters", "peft", f"beside {peft} layers, as calls of their own", instead)
    return None


def _graph_row(state: Accelerated | None, device: torch.device) -> dict[str, str] | None:
    if state is None:
        return None
    return _row("graph", "none", "runs eagerly: CUDA graphs need CUDA" if device.type == "cpu" else "")


def _table(model: dict[str, Any]) -> str:
    rows = [dict(zip(COLUMNS, COLUMNS, strict=True)), *model["rows"]]
    widths = {column: max(len(row[column]) for row in rows) for column in COLUMNS}
    name = f"{model['name']}: {model['model']}" if model["name"] else model["model"]
    lines = ("  ".join(row[column].ljust(widths[column]) for column in COLUMNS).rstrip() for row in rows)
    return "\n".join([name, *lines])
