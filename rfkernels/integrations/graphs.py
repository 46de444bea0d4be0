"""The forward of a whole model as CUDA graphs, as long as the model is what it was when they were made."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rfkernels.memory.graph import Capture, GraphRunner

__all__ = ["GraphForward"]


class GraphForward:
    """`own`, a bound forward of a model, replayed by `GraphRunner`.

    A graph knows tensors by their addresses. Where modules, parameters or buffers of the model were replaced
    since (adapters, other weights, another device), graphs are made anew. With what decides in Python at each
    call, where no graph sees it, the model runs eagerly: hooks (caches, offload), layers of peft. A copy of
    the model has its own graphs.
    """

    def __init__(self, own: Callable[..., Any], capture: Capture | None = None):
        self.__setstate__({"own": own, "capture": capture})

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return self.own(*args, **kwargs)
        if self._state() != self._known:
            self._begin()
        if self.reason or any(registry.hooks for registry in self._registries):
            self.reason = self.reason or _HOOKS
            return self.own(*args, **kwargs)
        return self.runner(*args, **kwargs)

    def report(self) -> str:
        """Graphs, replays, bytes; or why there are none."""
        return self.reason or str(self.runner.report())

    def _begin(self) -> None:
        self._modules = list(self.own.__self__.modules())
        self._owners = [d for m in self._modules for d in (m._modules, m._parameters, m._buffers)]
        found = [m.__dict__.get("_diffusers_hook") for m in self._modules]
        self._registries = [registry for registry in found if registry is not None]
        self._known = self._state()
        self.runner = GraphRunner(self.own, capture=self.capture)
        self.reason = _reason(self._modules)

    def _state(self) -> tuple[list[int], list[int]]:
        """Changes with every part that is replaced and every attribute that comes or goes."""
        parts = [id(part) for owner in self._owners for part in owner.values()]
        sizes = [len(m.__dict__) + len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self._modules]
        return parts, sizes

    def __getstate__(self) -> dict[str, Any]:
        return {"own": self.own, "capture": self.capture}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.own, self.capture = state["own"], state["capture"]
        self.__wrapped__ = self.own  # its signature
        self.runner, self.reason = GraphRunner(self.own, capture=self.capture), ""
        self._modules, self._owners, self._registries, self._known = [], [], [], None


_HOOKS = "hooks of modules (caches, offload) decide in Python at each call"


def _reason(modules: list[nn.Module]) -> str:
    if any(m._forward_hooks or m._forward_pre_hooks or "_hf_hook" in m.__dict__ for m in modules):
        return _HOOKS
    if any(type(m).__module__.startswith("peft.") for m in modules):
        return "adapters of peft have their strengths in Python: rfkernels.load_lora has them on the device"
    return ""
