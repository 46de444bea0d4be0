"""A whole small model twice, by diffusers and by ours on the same weights."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Case", "error", "models", "normal"]


@dataclass(frozen=True)
class Case:
    """A variant of a model: `config` makes both; `inputs` are keyword arguments of both forwards.

    `theirs` runs diffusers' model where its call is not `model(**inputs, return_dict=False)[0]`.
    """

    name: str
    theirs_class: str
    ours_class: Callable[..., nn.Module]
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    theirs: Callable[[nn.Module, dict], Tensor] | None = None
    wide: tuple[str, ...] = ()  # names, or parts of them, that stay float32 in a 16-bit model
    ours_config: dict[str, Any] = field(default_factory=dict)
    ours_state: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict  # of diffusers' state dict
    discrete: bool = False  # it makes choices that a rounding may turn: equal in float32 alone

    def __str__(self) -> str:
        return self.name

    def reference(self, model: nn.Module, inputs: dict) -> Tensor:
        if self.theirs is not None:
            return self.theirs(model, inputs)
        return model(**inputs, return_dict=False)[0]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers that bfloat16 has."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


@torch.no_grad()
def models(case: Case, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """diffusers' model and ours with the same random weights, all of them bfloat16 numbers."""
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # a model of diffusers may use what diffusers deprecates
        theirs = getattr(diffusers, case.theirs_class)(**case.config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name, p in theirs.named_parameters():
        spread = p.shape[1:].numel() ** -0.5 if p.ndim > 1 else 0.3
        value = spread * torch.randn(p.shape, generator=generator)
        p.copy_(
            (value + 1 if p.ndim == 1 and "norm" in name and name.endswith("weight") else value).bfloat16()
        )
    ours = case.ours_class(**case.config, **case.ours_config).eval().requires_grad_(False)
    ours.load_state_dict(case.ours_state(theirs.state_dict()))
    for model in (theirs, ours):
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if not any(part in name for part in case.wide) and p.is_floating_point():
                p.data = p.data.to(dtype)
    return theirs, ours


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    """Latents and embeddings in the dtype of a model; times and positions stay."""

    def one(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [one(name, v) for v in value]
        if isinstance(value, dict):
            return {key: one(name, v) for key, v in value.items()}
        axes = 1 if "pooled" in name or "feats" in name else 2
        moves = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > axes
        return value.to(dtype) if moves else value

    return {name: one(name, value) for name, value in inputs.items()}


def error(result: Tensor | list[Tensor], expected: Tensor | list[Tensor]) -> float:
    """|result - expected| / |expected|, of lists of tensors as one."""
    if isinstance(expected, list):
        assert [r.shape for r in result] == [e.shape for e in expected]
        result, expected = (torch.cat([t.flatten() for t in tensors]) for tensors in (result, expected))
    return float((result.double() - expected.double()).norm() / expected.double().norm())
