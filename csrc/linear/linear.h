#pragma once

#include <optional>
#include <string>

#include "core/tensor.h"

// Linear layers in every storage format of the weight.

namespace rfk {

using Optional = std::optional<TensorView>;

// out = residual + gate * act(x W^T + hidden up^T + bias), or codes rint(that / out_scale) in -127 .. 127
//
// x [m, k]: floating; or int8 or e4m3 codes, with x_scale f32 [m]. Rows may be strided.
// weight, contiguous: [n, k] like x, int8 or e4m3 (weight_scale one number or [n]); or u8 [n, k / 2],
// four-bit codes (weight_scale [n] or [n, groups], weight_zero [n, groups] u8 or floating;
// rfkernels/ops/linear.py). bias [n]; hidden [m, rank] f32 (f64), up [n, rank]; gate [s, n], s a divisor of
// m: row i reads gate row i s / m; residual [m, n]. bias, gate and residual are f32 (f64) or of the dtype of
// out or x.
void linear(Stream stream, const TensorView& out, const TensorView& x, const Optional& x_scale,
            const TensorView& weight, const Optional& weight_scale, const Optional& weight_zero,
            const Optional& bias, const Optional& hidden, const Optional& up, const Optional& gate,
            const Optional& residual, const Optional& out_scale, const Optional& workspace,
            const std::string& activation);

// The same beside blocks of a GGUF file, u8 [n, bytes of k numbers of `kind`], aligned to 4 bytes if the size
// of a block is, else to 2. x is floating.
void linear_gguf(Stream stream, const TensorView& out, const TensorView& x, const TensorView& blocks,
                 const Optional& weight_scale, const Optional& bias, const Optional& hidden,
                 const Optional& up, const Optional& gate, const Optional& residual,
                 const Optional& out_scale, const Optional& workspace, const std::string& activation,
                 const std::string& kind);

// out [n, k], floating: the numbers of such blocks, rounded once.
void dequantize_gguf(Stream stream, const TensorView& out, const TensorView& blocks, const std::string& kind);

// The bytes of workspace (u8, any alignment) that `linear` or `linear_gguf` needs for such tensors; on CUDA
// none.
int64_t linear_workspace(const TensorView& x, const TensorView& weight, const Optional& weight_scale,
                         const Optional& weight_zero, const Optional& up);

// Multiplies panels in the first cache, `repeats` times by every thread: the arithmetic of a product and
// nothing else ("int8", "bf16", "f32"). Returns the operations done, two a multiplication. For benchmarks.
int64_t linear_roof(const std::string& product, int64_t repeats);

}  // namespace rfk
