"""Modules on the ops: layers that replace those of `torch.nn` in a model."""

from rfkernels.nn.quant_linear import FORMATS as FORMATS
from rfkernels.nn.quant_linear import QuantLinear as QuantLinear
