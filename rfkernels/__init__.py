"""Rectified-flow generation on compiled CPU and CUDA kernels.

>>> import rfkernels
>>> images = rfkernels.generate(["a red heart", "a blue circle"], seed=1)  # PIL images
>>> pipe = rfkernels.Pipeline.load("emoji")                                # keeps the model loaded
>>> print(rfkernels.explain())                                             # what runs where, and why

Importing the package loads nothing heavy: every public name below is imported on first use.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rfkernels import adapters, editing, formats, models, nn, ops, samplers
    from rfkernels.adapters.load import load_lora, set_adapters, unload_lora
    from rfkernels.adapters.merge import merge_lora, unmerge_lora
    from rfkernels.diagnosis import explain
    from rfkernels.formats.native import load_quantized, save_quantized
    from rfkernels.integrations.accelerate import accelerate, restore
    from rfkernels.integrations.diffusers import stop_using_attention, use_attention
    from rfkernels.models.auto import load_model
    from rfkernels.pipeline import Pipeline, generate
    from rfkernels.quantization.model import quantize

    __version__: str

__all__ = [
    "Pipeline",
    "__version__",
    "accelerate",
    "adapters",
    "editing",
    "explain",
    "formats",
    "generate",
    "load_lora",
    "load_model",
    "load_quantized",
    "merge_lora",
    "models",
    "nn",
    "ops",
    "quantize",
    "restore",
    "samplers",
    "save_quantized",
    "set_adapters",
    "stop_using_attention",
    "unload_lora",
    "unmerge_lora",
    "use_attention",
]

_MODULES = frozenset({"adapters", "editing", "formats", "models", "nn", "ops", "samplers"})
_OBJECTS = {
    "Pipeline": "rfkernels.pipeline",
    "accelerate": "rfkernels.integrations.accelerate",
    "explain": "rfkernels.diagnosis",
    "generate": "rfkernels.pipeline",
    "load_lora": "rfkernels.adapters.load",
    "load_model": "rfkernels.models.auto",
    "load_quantized": "rfkernels.formats.native",
    "merge_lora": "rfkernels.adapters.merge",
    "quantize": "rfkernels.quantization.model",
    "restore": "rfkernels.integrations.accelerate",
    "save_quantized": "rfkernels.formats.native",
    "set_adapters": "rfkernels.adapters.load",
    "stop_using_attention": "rfkernels.integrations.diffusers",
    "unload_lora": "rfkernels.adapters.load",
    "unmerge_lora": "rfkernels.adapters.merge",
    "use_attention": "rfkernels.integrations.diffusers",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"rfkernels.{name}")
    if name in _OBJECTS:
        value = getattr(import_module(_OBJECTS[name]), name)
    elif name == "__version__":
        value = _installed_version()
    else:
        raise AttributeError(f"module 'rfkernels' has no attribute {name!r}")
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _installed_version() -> str:
    try:
        return import_module("rfkernels._version").__version__
    except ModuleNotFoundError:
        pass
    try:
        return version("rfkernels")
    except PackageNotFoundError:  # a source tree on the path that was never installed
        return "0+unknown"
