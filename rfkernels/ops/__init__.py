"""The ops: one module per family of kernels, each op beside its definition in plain torch."""

from rfkernels.ops._register import OPS as OPS
from rfkernels.ops.activation import *
from rfkernels.ops.attention import *
from rfkernels.ops.attention_merge import *
from rfkernels.ops.combine import *
from rfkernels.ops.embedding import *
from rfkernels.ops.gguf import *
from rfkernels.ops.grouped_linear import *
from rfkernels.ops.guidance import *
from rfkernels.ops.linear import *
from rfkernels.ops.moe import *
from rfkernels.ops.noise import *
from rfkernels.ops.norm import *
from rfkernels.ops.quantize import *
from rfkernels.ops.rope import *
from rfkernels.ops.rounding import *
from rfkernels.ops.solver import *
from rfkernels.ops.stochastic import *
