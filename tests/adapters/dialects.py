"""Files in the dialects of the wild, made from known differences of the original weights."""

import re

import torch
from torch import Tensor, nn

from tests.adapters.models import converted, original, original_names

RANK, ALPHA = 3, 2.0


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.1


def weights(model: nn.Module, alias_filter: str = "") -> dict[str, Tensor]:
    """The original weights that adapters change: of linear layers and convolutions, by module."""
    state = original(model)
    names = [n.removesuffix(".weight") for n, t in state.items() if n.endswith(".weight") and t.ndim > 1]
    return {n: state[f"{n}.weight"] for n in names if re.search(alias_filter, n)}


def low_rank(
    model: nn.Module, style: str, alias_filter: str = ""
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA of every layer in a style of `STYLES`, and the differences dW that it stands for."""
    prefix, flat, down, up, alpha = STYLES[style]
    tensors, deltas = {}, {}
    for i, (name, weight) in enumerate(weights(model, alias_filter).items()):
        stem = prefix + (name.replace(".", "_") if flat else name)
        a = randn(RANK, *weight.shape[1:], seed=2 * i)
        b = randn(weight.shape[0], RANK, *[1] * (weight.ndim - 2), seed=2 * i + 1)
        tensors |= {f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b}
        if alpha:
            tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
        scale = ALPHA / RANK if alpha else 1.0
        deltas[f"{name}.weight"] = scale * (b.flatten(1) @ a.flatten(1)).view(weight.shape)
    return tensors, deltas


STYLES = {  # prefix, underscores, names of factors, alpha
    "kohya": ("lora_unet_", True, "lora_down", "lora_up", True),
    "comfy": ("diffusion_model.", False, "lora_A", "lora_B", False),
    "ai-toolkit": ("diffusion_model.", False, "lora_down", "lora_up", True),
    "peft": ("base_model.model.", False, "lora_A.default", "lora_B.default", False),
    "dots": ("", False, "lora.down", "lora.up", True),
    "old": ("model.diffusion_model.", False, "lora_linear_layer.down", "lora_linear_layer.up", False),
}


def expected(
    family: str, model: nn.Module, deltas: dict[str, Tensor], strength: float = 1.0
) -> dict[str, Tensor]:
    """The model's state with differences of the original weights, through diffusers' converter."""
    state = original(model)
    for name, delta in deltas.items():
        assert name in state, name
        state[name] = state[name] + strength * delta.to(state[name].dtype)
    return converted(family, state)


def modules_and_bits(model: nn.Module) -> tuple[list[nn.Module], dict[str, Tensor]]:
    return list(model.modules()), {n: t.clone() for n, t in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: tuple[list[nn.Module], dict[str, Tensor]]) -> None:
    """The very modules, and every bit."""
    assert all(a is b for a, b in zip(model.modules(), before[0], strict=True))
    state = model.state_dict()
    assert state.keys() == before[1].keys()
    for name, tensor in before[1].items():
        assert torch.equal(state[name], tensor), name


def assert_state(model: nn.Module, wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    state = model.state_dict()
    assert state.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            state[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


__all__ = [
    "ALPHA",
    "RANK",
    "STYLES",
    "assert_state",
    "assert_untouched",
    "expected",
    "low_rank",
    "modules_and_bits",
    "original_names",
    "randn",
    "weights",
]
