"""The tensors of a model, its quantised layers in the words of a format."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from rfkernels.nn import QuantLinear

__all__ = ["model_tensors"]


def model_tensors(
    model: nn.Module, encode: Callable[[QuantLinear], dict[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors: those of `encode` for each quantised layer, the state dict's for the rest."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in layers:
            yield name, tensor
    for name, layer in layers.items():
        try:
            parts = encode(layer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        yield from ((f"{name}.{leaf}", tensor) for leaf, tensor in parts.items())
