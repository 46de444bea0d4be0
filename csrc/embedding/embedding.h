#pragma once

#include "core/tensor.h"

// What enters a transformer beside its tokens.

namespace rfk {

// out[r] = [cos a | sin a] (flip) or [sin a | cos a], a_i = scale (t[r] freqs[i]) in float32; an odd last
// column is 0. t: [*lead], any floating or integer dtype; freqs: f32[dim / 2]; out: [*lead, dim]; contiguous.
void timestep_embedding(Stream stream, const TensorView& out, const TensorView& t, const TensorView& freqs,
                        double scale, bool flip);

// The CUDA half, on tensors that the function above has checked.
void timestep_embedding_cuda(Stream stream, const TensorView& out, const TensorView& t,
                             const TensorView& freqs, double scale, bool flip);

}  // namespace rfk
