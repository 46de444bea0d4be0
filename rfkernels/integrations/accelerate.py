"""One line for a diffusers pipeline: our blocks, attention, layers and graphs, in the model as it is.

>>> rfkernels.accelerate(pipe)                          # or a transformer; the same object comes back
>>> rfkernels.accelerate(pipe, quant="int8-convrot", lora="style.safetensors")
>>> print(rfkernels.explain(pipe))                      # what runs where, or why not
>>> rfkernels.restore(pipe)                             # every bit as before
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from rfkernels.adapters.load import load_lora, unload_lora
from rfkernels.integrations.diffusers import stop_using_attention, use_attention
from rfkernels.integrations.families.forward import Forward, Unsupported
from rfkernels.integrations.graphs import GraphForward
from rfkernels.memory.backends import Backend
from rfkernels.memory.graph import Capture
from rfkernels.memory.plan import OVERHEAD, read_bytes
from rfkernels.memory.ring import Handle, stream_layers
from rfkernels.quantization.model import quantize, replace

__all__ = [
    "ATTENTIONS",
    "Accelerated",
    "accelerate",
    "accelerated",
    "forwards",
    "innermost",
    "restore",
    "transformers_of",
]

ATTENTIONS = ("auto", "full", "int8", "fp8", "bf16")
FAMILIES = ("auraflow", "chroma", "dit", "flux", "flux2", "flux3", "hidream", "lumina2", "qwen", "sd3", "wan")
FAMILIES += ("zimage",)
_STATE = "_rfkernels_accelerated"


@dataclass
class Site:
    """A block, and what became of it."""

    block: nn.Module
    refusal: str | None = None  # why its own forward stays
    calls: int = 0
    declined: Counter = field(default_factory=Counter)  # reasons of calls that its own forward ran
    device: str = ""


@dataclass
class Accelerated:
    """What `accelerate` did to one transformer."""

    sites: dict[str, Site] = field(default_factory=dict)
    attention: str = ""  # the precision; empty where diffusers' attention stays
    attention_refusal: str | None = None
    quant: str | None = None
    layers: dict[str, nn.Module] = field(default_factory=dict)  # those that were quantised away
    gone: bool = False  # or were not kept
    adapters: list[str] = field(default_factory=list)  # that came by `lora`
    streaming: Handle | None = None


def accelerate(
    pipe_or_transformer: Any,
    quant: str | Mapping[str, Any] | None = None,
    attention: str = "auto",
    lora: Any = None,
    graph: str | bool = "auto",
    *,
    vram: int | str | None = None,
    reversible: bool = True,
    tokens: int = 4608,
    backend: Backend | None = None,
    capture: Capture | None = None,
) -> Any:
    """Makes the transformers of a diffusers pipeline run on our kernels, and returns the same object.

    The forwards of blocks are replaced (rfkernels/integrations/families), those of attention processors too;
    modules, parameters, their names, hooks and `torch.compile` stay. A call that a block does not cover runs
    the block's own forward. `explain` says which, `restore` takes everything back.

    Args:
        pipe_or_transformer: a pipeline, or one of its transformers.
        quant: a method of `rfkernels.quantize`, or a mapping with "method" and its options, for the linear
            layers. Names in the state dict change then, and peft does not know the layers: adapters come by
            `lora`, or `rfkernels.load_lora`.
        attention: a precision of `rfkernels.ops.attention`; "auto" without `quant` is "full", with it int8
            for every head that bears it.
        lora: an adapter, as `rfkernels.load_lora` takes it, or several by name; it stands beside the weights.
        graph: "auto" replays the model's forward as CUDA graphs where that is right
            (`rfkernels.memory.GraphRunner`); False never does.
        vram: what a transformer may take of the device, as "7.5G" or a number of bytes: blocks that do not
            fit are streamed (`rfkernels.memory.stream_layers`), without graphs. Two transformers of a
            pipeline (Wan 2.2) get half each.
        reversible: keep the layers that `quant` replaces, for `restore`; False frees them.
        tokens: of a sample and its text, for the room that `vram` leaves to activations.
        backend, capture: in the place of CUDA's streams and graphs, for tests.

    Raises:
        TypeError: an object without a transformer of diffusers.
        ValueError: a transformer without any block that is known here; unknown methods; too little vram;
            accelerated already. The object is as it was then, but for layers quantised with
            `reversible=False`.
    """
    if graph not in ("auto", True, False):
        raise ValueError(f"accelerate: graph must be 'auto' or a bool, got {graph!r}")
    if attention not in ATTENTIONS:
        raise ValueError(f"accelerate: attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    models = transformers_of(pipe_or_transformer)
    if not models:
        raise TypeError(
            "accelerate: a diffusers pipeline or transformer is required, got "
            f"{type(pipe_or_transformer).__name__} without one"
        )
    for name, model in models.items():
        if accelerated(model) is not None:
            raise ValueError(f"accelerate: {name or type(model).__name__} is accelerated; restore it first")
    done = []
    try:
        for model in models.values():
            done.append(model)
            _accelerate(model, quant, attention, lora, reversible)
            if vram is not None:
                share = read_bytes(vram) // len(models)
                accelerated(model).streaming = _stream(model, share, tokens, backend)
            elif graph and "" not in accelerated(model).sites:  # a block alone has no forward around it
                _put(model, GraphForward(innermost(model), capture))
    except Exception:
        for model in done:
            _restore(model)
        raise
    return pipe_or_transformer


def restore(pipe_or_transformer: Any) -> Any:
    """Takes back what `accelerate` did, bit by bit, and returns the same object.

    Raises:
        ValueError: layers were quantised with `reversible=False`.
    """
    models = transformers_of(pipe_or_transformer).values()
    for model in models:
        state = accelerated(model)
        if state is not None and state.gone:
            raise ValueError("restore: layers quantised with reversible=False are gone; load the model again")
    for model in models:
        _restore(model)
    return pipe_or_transformer


def accelerated(model: nn.Module) -> Accelerated | None:
    """What was done to a transformer; None if nothing was."""
    return model.__dict__.get(_STATE)


def transformers_of(obj: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline by name, not what torch.compile made of them; a module itself is one."""
    if isinstance(obj, nn.Module):
        return {"": getattr(obj, "_orig_mod", obj)}
    found = getattr(obj, "components", None)
    if not isinstance(found, Mapping):
        return {}
    modules = {n: getattr(m, "_orig_mod", m) for n, m in found.items() if n.startswith("transformer")}
    return {n: m for n, m in modules.items() if isinstance(m, nn.Module)}


@functools.cache
def forwards() -> dict[str, Forward]:
    """Our forwards by the names of diffusers' classes."""
    modules = (import_module(f"rfkernels.integrations.families.{name}") for name in FAMILIES)
    return {name: forward for module in modules for name, forward in module.BLOCKS.items()}


def _accelerate(model: nn.Module, quant, attention: str, lora, reversible: bool) -> None:
    state = Accelerated()
    model.__dict__[_STATE] = state
    known = forwards()
    for path, block in model.named_modules():
        forward = known.get(type(block).__name__)
        if forward is not None and type(block).__module__.startswith("diffusers."):
            site = state.sites[path] = Site(block, forward.refusal(block))
            if site.refusal is None:
                _put(block, BlockForward(site, forward.run, innermost(block)))
    if not state.sites:
        raise ValueError(
            f"accelerate: {type(model).__name__} has no known block; known are {', '.join(sorted(known))}"
        )
    options = {"method": quant} if isinstance(quant, str) else dict(quant or {})
    precision = ("auto" if options else "full") if attention == "auto" else attention
    state.attention = precision
    for module in _attentions(state):
        module.precision = precision
    try:
        use_attention(model, "full" if precision == "bf16" else precision)
    except ValueError as error:  # a processor of somebody else: it stays
        state.attention_refusal = str(error)
    if options:
        _quantize(model, state, options, reversible)
    if lora is not None:
        for name, source in (lora if _is_named(lora) else {None: lora}).items():
            state.adapters.append(load_lora(model, source, name=name).name)


def _is_named(lora: Any) -> bool:
    """Several adapters by name, not the tensors of one."""
    return isinstance(lora, Mapping) and not any(isinstance(v, Tensor) for v in lora.values())


def _quantize(model: nn.Module, state: Accelerated, options: dict[str, Any], reversible: bool) -> None:
    before = dict(model.named_modules()) if reversible else {}
    state.quant = options.pop("method", None)
    if state.quant is None:
        raise ValueError("accelerate: quant as a mapping must have 'method'")
    report = quantize(model, state.quant, **options)
    names = [layer.name for layer in report.layers if layer.format != "high"]
    state.layers = {name: before[name] for name in names} if reversible else {}
    state.gone = bool(names) and not reversible


def _restore(model: nn.Module) -> None:
    state = accelerated(model)
    if state is None:
        return
    if state.streaming is not None:
        state.streaming.restore()
    _take(model)
    with suppress(ValueError):  # what was unloaded already
        for name in [None] if state.layers else state.adapters:  # no adapter stays without its layer
            unload_lora(model, name)
    for name, layer in state.layers.items():
        replace(model, name, layer)
    for site in state.sites.values():
        _take(site.block)
    for module in _attentions(state):
        module.__dict__.pop("precision", None)
    stop_using_attention(model)
    del model.__dict__[_STATE]


def _stream(model: nn.Module, vram: int, tokens: int, backend: Backend | None) -> Handle:
    """Blocks that do not fit beside the rest, a step's activations and CUDA itself come and go."""
    sites = accelerated(model).sites
    blocks = {id(t) for site in sites.values() for t in (*site.block.parameters(), *site.block.buffers())}
    rest = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if id(t) not in blocks)
    wide = max((m.in_features + m.out_features for m in model.modules() if _is_layer(m)), default=0)
    width = min((m.in_features for s in sites.values() for m in s.block.modules() if _is_layer(m)), default=0)
    fixed = rest + OVERHEAD + 2 * tokens * (2 * width + wide)
    if vram <= fixed:
        raise ValueError(
            f"accelerate: vram must be more than {fixed:,} bytes, what is no block, {tokens} tokens and CUDA "
            f"itself take, got {vram:,}"
        )
    return stream_layers(model, list(sites), resident_bytes=vram - fixed, backend=backend)


def _attentions(state: Accelerated) -> Iterator[nn.Module]:
    for site in state.sites.values():
        if site.refusal is None:
            yield from (m for m in site.block.modules() if hasattr(m, "heads"))


# --- the forward of a block, below the hooks of diffusers and accelerate ---


class BlockForward:
    """Our forward of one block, which leaves to `own` what it does not cover; copied with its block."""

    def __init__(self, site: Site, run: Callable[..., Any], own: Callable[..., Any]):
        self.site, self.run, self.own = site, run, own
        self.__wrapped__ = own  # its signature
        inner = [(path, m) for path, m in site.block.named_modules() if path and not _is_layer(m)]
        self.inner = [(path, m, _processor(m)) for path, m in inner]  # modules that `run` does not call

    def __call__(self, *args, **kwargs):
        site = self.site
        try:
            _check_placed(site.block, args, kwargs)
            self._check_inner()
            result = self.run(site.block, *args, **kwargs)
        except Unsupported as reason:
            if not torch.compiler.is_compiling():
                site.declined[str(reason)] += 1
            return self.own(*args, **kwargs)
        if not torch.compiler.is_compiling():
            site.calls += 1
            outputs = result if isinstance(result, tuple) else (result,)
            first = next(out for out in outputs if out is not None)  # the last text of SD3 is None
            site.device = str(first.device)
        return result

    def _check_inner(self) -> None:
        """What somebody else put into the modules that are not called here would be passed over."""
        for path, module, processor in self.inner:
            if module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__:
                raise Unsupported(f"{path} has a hook")
            if _processor(module) is not processor:
                raise Unsupported(f"{path}.processor is another since accelerate")
            if getattr(processor, "_parallel_config", None) is not None:
                raise Unsupported(f"{path}.processor works in parallel with other devices")


def _is_layer(module: nn.Module) -> bool:
    """One that blocks call as it is: of a weight, or with adapters in it."""
    return hasattr(module, "in_features")


def _processor(module: nn.Module) -> Any:
    """That of an attention; one of ours stands for what it replaced."""
    processor = getattr(module, "processor", None)
    return getattr(processor, "replaced", processor)


def _check_placed(block: nn.Module, args: tuple, kwargs: dict) -> None:
    """Weights that hooks bring layer by layer are not there when a block begins."""
    x = args[0] if args else next(iter(kwargs.values()), None)
    weight = next(block.parameters(), None)
    if weight is not None and isinstance(x, Tensor) and weight.device != x.device:
        raise Unsupported(f"weights on {weight.device}, tokens on {x.device}: offloaded layer by layer")


def _places(block: nn.Module) -> Iterator[tuple[Any, str]]:
    """Where the innermost forward of a block may be kept: owner and attribute."""
    registry = getattr(block, "_diffusers_hook", None)
    for reference in getattr(registry, "_fn_refs", ()):
        yield reference, "original_forward" if reference.original_forward is not None else "forward"
    if "_old_forward" in block.__dict__:  # a hook of the package accelerate
        yield block, "_old_forward"
    yield block, "forward"


def innermost(block: nn.Module) -> Callable[..., Any]:
    owner, name = next(_places(block))
    return getattr(owner, name)


def _put(block: nn.Module, forward: Callable[..., Any]) -> None:
    owner, name = next(_places(block))
    setattr(owner, name, forward)


def _take(block: nn.Module) -> None:
    for owner, name in _places(block):
        if isinstance(forward := getattr(owner, name), (BlockForward, GraphForward)):
            setattr(owner, name, forward.own)
    if getattr(block.__dict__.get("forward"), "__func__", None) is type(block).forward:
        del block.forward  # the class has it
