"""Adapters of linear layers, a file per family: docs/adapters.md has the table."""

from rfkernels.adapters.base import Adapter, Factors
from rfkernels.adapters.bottleneck import Bottleneck, BottleneckStack, ConformerAdapter, ast_adapters
from rfkernels.adapters.dora import DoRA
from rfkernels.adapters.ensemble import MomentumPair, max_ensemble, merge_earlier, retrieve
from rfkernels.adapters.hadamard import QWHA, iwht, qwha_init, wht
from rfkernels.adapters.hydra import Hydra
from rfkernels.adapters.kronecker import SoKA, kpsvd, kron_apply, soka_init
from rfkernels.adapters.linear_adapter import LinearAdapter, shift_heads
from rfkernels.adapters.lora import LoRA, concatenate, pissa_to_lora, truncate
from rfkernels.adapters.lycoris import LoHa, LoKr
from rfkernels.adapters.pruning import SPLoPA, SPLoRA, SPPaRA
from rfkernels.adapters.routed import MoLA, Poly
from rfkernels.adapters.timestep import Switch, TimestepLoRA

__all__ = [
    "QWHA",
    "Adapter",
    "Bottleneck",
    "BottleneckStack",
    "ConformerAdapter",
    "DoRA",
    "Factors",
    "Hydra",
    "LinearAdapter",
    "LoHa",
    "LoKr",
    "LoRA",
    "MoLA",
    "MomentumPair",
    "Poly",
    "SPLoPA",
    "SPLoRA",
    "SPPaRA",
    "SoKA",
    "Switch",
    "TimestepLoRA",
    "ast_adapters",
    "concatenate",
    "iwht",
    "kpsvd",
    "kron_apply",
    "max_ensemble",
    "merge_earlier",
    "pissa_to_lora",
    "qwha_init",
    "retrieve",
    "shift_heads",
    "soka_init",
    "truncate",
    "wht",
]
