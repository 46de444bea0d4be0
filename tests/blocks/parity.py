"""One block twice, by diffusers and by our ops with the same weights: outputs and every gradient."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Problem", "errors", "normal", "run", "tokens"]

Forward = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Problem:
    """A block of diffusers, inputs for it, and both ways to run them: forward(module, **inputs)."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    theirs: Forward
    ours: Forward
    # Inputs and parameters that stay in float32 beside 16-bit tokens.
    wide: tuple[str, ...] = ()
    # Parameters whose gradient is zero but for rounding: the bias of keys that are neither normed nor rotated
    # adds the same to all scores of a query.
    flat: tuple[str, ...] = ()
    # Layers whose output is normed: made small, so that the epsilon of that norm matters.
    small: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


def normal(*shape: int) -> Tensor:
    """Standard normal numbers, rounded to bfloat16: a run in 16 bits has the inputs of the exact one."""
    return torch.randn(shape).bfloat16().float()


def tokens(*shape: int) -> Tensor:
    """The same, with tokens of very different size: for the small ones the epsilon of a norm matters."""
    return normal(*shape) * 2.0 ** -torch.randint(0, 7, (*shape[:-1], 1))


@torch.no_grad()
def weights(problem: Problem) -> nn.Module:
    """The block with norms that are not the identity, and every weight a bfloat16 number."""
    module = problem.build().eval()
    for name, p in module.named_parameters():
        if p.ndim == 2:
            p *= 3**0.5  # so that a matmul keeps the variance of its input
        if p.std() == 0:  # ones and zeros
            p += 0.3 * torch.randn_like(p)
        if name.startswith(problem.small):
            p /= 16
        p.copy_(p.bfloat16())
    return module


def run(problem: Problem, forward: Forward, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs, and the gradients of all floating inputs and parameters along a random direction, by name."""
    torch.manual_seed(0)
    module = weights(problem)
    inputs = problem.inputs()
    for name, p in module.named_parameters():
        if name not in problem.wide:
            p.data = p.data.to(dtype)
    for name, x in inputs.items():
        if x.is_floating_point():
            inputs[name] = x.to(torch.float32 if name in problem.wide else dtype).requires_grad_()
    outputs = forward(module, **inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    torch.autograd.backward(outputs, [normal(*out.shape).to(out.dtype) for out in outputs])
    result = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    leaves = inputs | dict(module.named_parameters())
    return result | {f"gradient of {name}": x.grad for name, x in leaves.items() if x.requires_grad}


def errors(problem: Problem, result: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """|result - expected| / |expected| of every tensor; |result| where all of expected is zero."""
    assert result.keys() == expected.keys()
    found = {}
    for name, x in result.items():
        reference = scale = expected[name].double()
        if name.removeprefix("gradient of ") in problem.flat:
            scale = expected[name.removesuffix("bias") + "weight"].double()
        found[name] = ((x.double() - reference).norm() / (scale.norm() or 1)).item()
    return found
