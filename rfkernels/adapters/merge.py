"""Adapters merged into the weights that they stand beside, and out again bit for bit.

    W' = W + sum_i w_i s_i B_i A_i   (what the model computes at that moment, in a wide type, rounded once)

Restoring copies what was kept; nothing is ever subtracted. `rounding="stochastic"` keeps changes far below a
step of the stored type on average, which rounding to nearest drops.

A quantised layer is merged through its dequantised weight and quantised again in its own format
(`requantize`), codes rounded as asked. Merging there costs what quantising costs in accuracy; the branch
beside it does not. Blocks of a GGUF file are not written: adapters stay beside them.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rfkernels.adapters.base import Factors, weight_of, wide
from rfkernels.adapters.lora import concatenate, truncate
from rfkernels.adapters.requantize import refuse_blocks, requantize
from rfkernels.adapters.state import State, state_of
from rfkernels.nn import LoRALinear, QuantLinear
from rfkernels.ops.rounding import merge_low_rank, round_to

__all__ = ["combine_adapters", "merge_lora", "unmerge_lora"]


@torch.no_grad()
def merge_lora(
    model: nn.Module,
    names: str | Sequence[str] | None = None,
    *,
    rounding: str = "nearest",
    seed: int = 0,
) -> None:
    """Merges adapters at their present strengths and times; others stay beside the weights.

    Args:
        names: by default all.
        rounding: "nearest" or "stochastic".
        seed: of stochastic rounding; every layer draws its own.

    Raises:
        ValueError: strengths per sample, an adapter that no weight can express (which says why), or a weight
            in blocks of a GGUF file. The model is then as before.
    """
    state = state_of(model)
    if state is None:
        raise ValueError("merge_lora: a model with adapters required, none are loaded")
    if state.merged is not None:
        raise ValueError("merge_lora: adapters are merged already, unmerge_lora(model) first")
    names = list(state.strengths) if names is None else [names] if isinstance(names, str) else list(names)
    missing = [n for n in names if n not in state.strengths]
    if missing:
        raise ValueError(f"merge_lora: names must be of {list(state.strengths)}, got {missing}")
    state.merged = {}
    try:
        for path, layer in state.layers.items():
            chosen = torch.tensor([n in names for n in layer.slots], device=layer.layer.unit.device)
            if not chosen.any():
                continue
            refuse_blocks(layer.layer.base, path)
            weight, bias = merged_weight(layer.layer, chosen, path)
            base = layer.layer.base
            state.merged[path] = _kept(base)
            store(base, weight, bias, rounding, (seed + zlib.crc32(path.encode())) % 2**63)
            layer.layer.write(layer.layer.strength.masked_fill(chosen, 0))
            if all(n is None or n in names for n in layer.slots):
                state.put(path, base)
    except ValueError:
        _restore(state)
        raise


@torch.no_grad()
def unmerge_lora(model: nn.Module) -> None:
    """The weights of before the merge, bit for bit, and the adapters beside them."""
    state = state_of(model)
    if state is None or state.merged is None:
        raise ValueError("unmerge_lora: merged adapters required, none are")
    _restore(state)


def _restore(state: State) -> None:
    for path, kept in state.merged.items():
        base = state.layers[path].layer.base
        for name, tensor in kept.items():
            if tensor is None:
                base.register_parameter(name, None)
            else:
                getattr(base, name).copy_(tensor)
        state.put(path, state.layers[path].layer)
    state.merged = None
    state.write()


def merged_weight(layer: LoRALinear, chosen: Tensor, path: str = "") -> tuple[Tensor, Tensor | None]:
    """Weight and bias with the chosen slots `[slots]` (bool) in them, float32 or float64."""
    if layer.scale.ndim > 1:
        raise ValueError(
            f"merge_lora: strengths and times must be one for all samples, got {path} per sample"
        )
    weight, bias = weight_of(layer.base)
    start = wide(weight)
    strength = layer.strength * chosen
    columns = strength[layer.slot] * layer.unit * layer.coefficient
    total = start
    if layer.column_table is not None:
        total = (1 + strength @ layer.column_table)[:, None].to(start) * start
    total = merge_low_rank(total, layer.down, layer.up, columns)
    bias = None if bias is None else bias.to(start)
    if layer.bias_table is not None:
        added = (strength @ layer.bias_table).to(start)
        bias = added if bias is None else bias + added
    for slot, extra in zip(layer.extra_slots, layer.extras, strict=True):
        if strength[slot]:
            merged, moved = extra.merged(start, bias)
            total = total + strength[slot].to(start) * (merged - start)
            if moved is not None:
                bias = moved if bias is None else bias + strength[slot].to(start) * (moved - bias)
    return total, bias


def _kept(base: nn.Module) -> dict[str, Tensor | None]:
    tensors = {n: t for n, t in (*base._parameters.items(), *base._buffers.items()) if t is not None}
    return {"bias": None, **{n: t.detach().clone() for n, t in tensors.items()}}


def store(base: nn.Module, weight: Tensor, bias: Tensor | None, rounding: str, seed: int) -> None:
    """Writes a weight and a bias into a layer, in place."""
    if isinstance(base, nn.Linear):
        base.weight.copy_(round_to(weight, base.weight.dtype, rounding=rounding, seed=seed))
        dtype = base.weight.dtype
    elif isinstance(base, QuantLinear):
        requantize(base, weight, rounding, seed)
        dtype = base.dtype
    else:
        raise ValueError(f"merge_lora: an nn.Linear or QuantLinear required, got {type(base).__name__}")
    if bias is None:
        return
    if base.bias is None:
        base.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    else:
        base.bias.copy_(bias)


@torch.no_grad()
def combine_adapters(
    model: nn.Module, names: Sequence[str], strengths: Sequence[float], rank: int | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One adapter that is the weighted sum of loaded ones: sum_i w_i s_i B_i A_i, exactly or to a rank.

    Args:
        rank: of the result in every layer; by default the sum of the ranks, exactly. Else the best
            approximation of that rank, by QR of the factors and an SVD of their R x R core.

    Returns:
        Tensors in peft's names, ready for `load_lora` and safetensors; relative errors (Frobenius) by layer.

    Raises:
        ValueError: an adapter that is no low-rank branch in every layer, such as DoRA or a changed parameter.
    """
    state = state_of(model)
    have = [] if state is None else list(state.strengths)
    if len(names) != len(strengths) or any(n not in have for n in names):
        raise ValueError(
            f"combine_adapters: a strength for names of {have} required, got {names}, {strengths}"
        )
    changed = [p for p, patched in state.patched.items() if any(n in patched.patches for n in names)]
    if changed:
        raise ValueError(f"combine_adapters: low-rank branches alone required, got a change of {changed[0]}")
    tensors, errors = {}, {}
    for path, layer in state.layers.items():
        chosen = [(layer.slot_of(n), w) for n, w in zip(names, strengths, strict=True) if n in layer.slots]
        if not chosen:
            continue
        parts = [_factors(layer.layer, slot, path) for slot, _ in chosen]
        factors, error = concatenate(parts, [w for _, w in chosen]), 0.0
        if rank is not None and rank < len(factors.down):
            factors, error = truncate(factors, rank)
        tensors[f"{path}.lora_A.weight"] = factors.down.contiguous()
        tensors[f"{path}.lora_B.weight"] = wide(factors.up).contiguous()
        if factors.bias is not None:
            tensors[f"{path}.lora_B.bias"] = factors.bias.contiguous()
        errors[path] = error
    return tensors, errors


def _factors(layer: LoRALinear, slot: int, path: str) -> Factors:
    """What a slot holds, without its padding."""
    columns, table = layer.columns(slot), layer.column_table
    if slot in layer.extra_slots or (table is not None and table[slot].any()):
        raise ValueError(f"combine_adapters: low-rank branches alone required, got another family in {path}")
    rank = int(layer.unit[columns].count_nonzero())
    used = slice(columns.start, columns.start + rank)
    bias = None if layer.bias_table is None or not layer.bias_table[slot].any() else layer.bias_table[slot]
    scale = float(layer.unit[columns.start]) if rank else 1.0
    return Factors(wide(layer.down[used]), wide(layer.up[:, used]), scale, bias)
