"""Quantisers: weights `[out, in]` into the storage formats of `rfkernels.ops.linear`, without calibration.

Whole models: `rfkernels.quantize`, in `rfkernels.quantization.model`.
"""

from rfkernels.quantization.int4 import quantize_int4 as quantize_int4
from rfkernels.quantization.int8 import ROTATIONS as ROTATIONS
from rfkernels.quantization.int8 import check_finite as check_finite
from rfkernels.quantization.int8 import largest_rotation as largest_rotation
from rfkernels.quantization.int8 import quantize_fp8 as quantize_fp8
from rfkernels.quantization.int8 import quantize_int8 as quantize_int8
from rfkernels.quantization.svdq import quantize_svdq as quantize_svdq
from rfkernels.quantization.svdq import truncated_svd as truncated_svd
from rfkernels.quantization.weight import FORMATS as FORMATS
from rfkernels.quantization.weight import quantize_weight as quantize_weight
