#pragma once

#include "core/tensor.h"

// Guidance: combine velocities, then step. Types, row scalars and `out` as in solver/solver.h.

namespace rfk {

// out = a x + b (uncond + guidance (cond - uncond)): classifier-free guidance folded into an
// affine step. guidance, a, b: row scalars.
void cfg_step(Stream stream, const TensorView& out, const TensorView& x, const TensorView& uncond,
              const TensorView& cond, const TensorView& guidance, const TensorView& a, const TensorView& b);

// The CUDA half, on tensors that the function above has checked.
void cfg_step_cuda(Stream stream, const TensorView& out, const TensorView& x, const TensorView& uncond,
                   const TensorView& cond, const TensorView& guidance, const TensorView& a,
                   const TensorView& b);

}  // namespace rfk
