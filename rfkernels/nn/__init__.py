"""Modules on the ops: layers that replace those of `torch.nn` in a model."""

from rfkernels.adapters.base import run_linear as run_linear
from rfkernels.nn.grouped import local_attention as local_attention
from rfkernels.nn.grouped import sliced_attention as sliced_attention
from rfkernels.nn.grouped import zero_i2v_head_shift as zero_i2v_head_shift
from rfkernels.nn.lora import LoRALinear as LoRALinear
from rfkernels.nn.quant_linear import FORMATS as FORMATS
from rfkernels.nn.quant_linear import QuantLinear as QuantLinear
from rfkernels.nn.schedule import mixed_coefficients as mixed_coefficients
from rfkernels.nn.schedule import mixed_factors as mixed_factors
from rfkernels.nn.streaming import ContinualAttention as ContinualAttention
from rfkernels.nn.streaming import KeyValueWindow as KeyValueWindow
