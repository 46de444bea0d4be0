"""Registration of ops with torch: the one place that talks to `torch.library`.

An op has two schemas. `rfkernels::<name>` returns new tensors and is differentiable;
`rfkernels::<name>_out` writes into its first arguments and is not. Both run the same kernel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["OPS", "Op", "accumulator", "define", "row_scalar", "sum_to_rows"]

Outputs = Tensor | tuple[Tensor, ...] | list[Tensor]
_library = torch.library.Library("rfkernels", "DEF")
OPS: dict[str, "Op"] = {}


@dataclass(frozen=True)
class Op:
    """A registered op: its definition in plain torch, an empty result, its two dispatcher entries."""

    name: str
    reference: Callable[..., Outputs]
    empty: Callable[..., Outputs]
    functional: torch._ops.OpOverload
    out_variant: torch._ops.OpOverload

    def __call__(self, *args, out: Outputs | None = None) -> Outputs:
        differentiable = torch.is_grad_enabled() and any(map(_requires_grad, args))
        if out is None:
            if differentiable or torch.compiler.is_compiling():
                return self.functional(*args)
            out = self.empty(*args)  # without the autograd layer a call costs half: 3.5 us against 7.2
        elif differentiable or (torch.is_grad_enabled() and any(t.requires_grad for t in _tuple(out))):
            raise RuntimeError(
                f"{self.name}: out= has no gradient, call it without out= or under torch.no_grad()"
            )
        self.out_variant(*_results(out), *args)
        return out


def define(
    name: str,
    params: str,
    kernel: Callable[..., None],
    empty: Callable[..., Outputs],
    reference: Callable[..., Outputs],
    backward: Callable[..., tuple] | None = None,
    saves: Callable[..., Sequence] = lambda out, *args: args,
    outputs: Sequence[str] | None = ("out",),
    strided_grads: bool = False,
) -> Op:
    """Registers an op for the CPU and CUDA.

    Args:
        params: the schema's parameters, `"Tensor x, Tensor v"`.
        kernel: `kernel(*outs, *args)`, which fills the results.
        empty: `empty(*args)`: an uninitialised result, or a tuple of them. It is the fake (meta)
            implementation too.
        reference: the definition in plain torch.
        backward: `backward(grad, needs, *saved)`: one gradient, or None, per argument; `needs` says
            which ones are wanted. Of an op with several results `grad` is a tuple, None where a result
            was not used.
        saves: what `backward` gets, from the result and the arguments; by default all arguments.
        outputs: the names of the results; None: a list of them, as long as `empty` makes it.
        strided_grads: `backward` takes gradients as autograd has them; else they are contiguous.
    """

    def functional(*args):
        out = empty(*args)
        kernel(*_results(out), *args)
        return out

    if outputs is None:
        results, writes = "Tensor[]", "Tensor(a!)[] out"
    else:
        results = "Tensor" if len(outputs) == 1 else f"({', '.join(['Tensor'] * len(outputs))})"
        writes = ", ".join(f"Tensor({'abcdef'[i]}!) {out}" for i, out in enumerate(outputs))
    _library.define(f"{name}({params}) -> {results}")
    _library.define(f"{name}_out({writes}, {params}) -> ()")
    for key in ("CPU", "CUDA"):
        _library.impl(name, functional, key)
        _library.impl(f"{name}_out", kernel, key)
    torch.library.register_fake(f"rfkernels::{name}", empty, lib=_library)
    torch.library.register_fake(f"rfkernels::{name}_out", lambda *args: None, lib=_library)
    if backward is not None:

        def setup_context(ctx, inputs, output):
            values = saves(output, *inputs)
            ctx.save_for_backward(*(v for v in values if isinstance(v, Tensor)))
            ctx.others = [None if isinstance(v, Tensor) else (v,) for v in values]
            ctx.set_materialize_grads(False)

        def run_backward(ctx, *grads):
            grads = grads if outputs is not None else tuple(grads[0])
            if all(g is None for g in grads):
                needs = ctx.needs_input_grad  # of a list of tensors a list
                return tuple([None] * len(n) if isinstance(n, (list, tuple)) else None for n in needs)
            tensors = iter(ctx.saved_tensors)
            saved = [next(tensors) if other is None else other[0] for other in ctx.others]
            if not strided_grads:
                grads = tuple(None if g is None else g.contiguous() for g in grads)
            single = outputs is not None and len(grads) == 1
            return backward(grads[0] if single else grads, ctx.needs_input_grad, *saved)

        torch.library.register_autograd(
            f"rfkernels::{name}", run_backward, setup_context=setup_context, lib=_library
        )
    namespace = torch.ops.rfkernels
    functional_entry, out_entry = getattr(namespace, name).default, getattr(namespace, f"{name}_out").default
    op = Op(name, reference, empty, functional_entry, out_entry)
    OPS[name] = op
    return op


def row_scalar(value: float | Tensor, x: Tensor) -> Tensor:
    """`value` as a row scalar for `x`: tensors as they are, numbers as 0-d tensors on the device of `x`.

    A number costs a small copy to the device; in a captured graph or a loop pass a tensor.
    """
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=accumulator(x.dtype), device=x.device)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, row scalars and gradients of tables for tensors of `dtype`: float32, or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_to_rows(products: Tensor, scalar: Tensor) -> Tensor:
    """The gradient of a row scalar: `products`, shaped like x, summed over what shares one scalar."""
    shape = (*scalar.shape, *[1] * (products.ndim - scalar.ndim))
    return products.sum_to_size(shape).view(scalar.shape).to(scalar.dtype)


def expand_rows(scalar: Tensor, x: Tensor) -> Tensor:
    """A row scalar with trailing axes of length 1, so that it broadcasts against `x`."""
    return scalar.reshape(*scalar.shape, *[1] * (x.ndim - scalar.ndim))


def _tuple(out: Outputs) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(out)


def _results(out: Outputs) -> tuple:
    """The results as the first arguments of a kernel: a list is one of them."""
    return out if isinstance(out, tuple) else (out,)


def _requires_grad(value) -> bool:
    tensors = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
