#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/tensor.h"

// Attention, and what combines its results.

namespace rfk {

// out = (softmax(scale q k^T + bias) * C) v and lse = log(sum(exp(scale q k^T + bias))), over the keys that a
// query sees. A query that sees none has out 0 and lse -infinity.
//
// q, out [batch, heads, rows, d], k, v [batch, kv_heads, keys, d] of one floating dtype, through any strides
// but for d; kv_heads divides heads. lse [batch, heads, rows], contiguous, f32 (f64).
// bias [batch | 1, heads | 1, rows | 1, keys], f32 (f64) or like q, any strides but for keys (stride 0 too).
// factor: C(i, j) = factor[h][j - i + rows - 1], f32 (f64) [heads | 1, rows + keys - 1].
// key_lengths i32 [batch]: keys from there on are not seen. q_starts, k_starts i32 [sequences + 1], with
// batch 1: sequences one behind the other, whose queries see their own keys alone; not with bias, factor,
// key_lengths, block_mask or head_shift. block_mask u8 [batch | 1, heads | 1, rows / 128, keys / 64]
// (rounded up): blocks that are 0 are not seen. head_shift i32 [kv_heads] and frames: kv head h of sample b
// is that of sample b + head_shift[h], where both are of the same run of `frames` samples, else its own.
//
// precision: "full" multiplies numbers of the dtype. "int8" and "fp8" multiply q and k - key_mean as int8
// codes with a scale per token; "int8" then weights of eight bits by int8 codes of v, "fp8" e4m3 by e4m3
// where the device has it, else 16-bit numbers. key_mean f32 [batch or sequences, kv_heads, d]: any vector;
// absent: the mean over the keys. "auto": "int8" for the heads whose expected error is within kErrorBudget,
// else "full"; fell_back u8 [batch or sequences, heads] becomes 1 there. It may be given for "auto" alone.
void attention(Stream stream, const TensorView& out, const TensorView& lse, const TensorView& q,
               const TensorView& k, const TensorView& v, const std::optional<TensorView>& bias,
               const std::optional<TensorView>& factor, const std::optional<TensorView>& key_lengths,
               const std::optional<TensorView>& q_starts, const std::optional<TensorView>& k_starts,
               const std::optional<TensorView>& block_mask, const std::optional<TensorView>& head_shift,
               const std::optional<TensorView>& key_mean, const std::optional<TensorView>& fell_back,
               const std::optional<TensorView>& workspace, double scale, int64_t frames,
               const std::string& precision);

// The bytes of workspace (u8, aligned to 16) that `attention` needs for such tensors.
int64_t attention_workspace(const TensorView& q, const TensorView& k,
                            const std::optional<TensorView>& q_starts, const std::string& precision);

// The result over the union of up to eight disjoint sets of keys, from the results over each:
// lse = log(sum_k exp(lses[k])) and out = sum_k exp(lses[k] - lse) outs[k]. A part of -infinity has no
// weight, whatever its out is; a row of such parts alone is 0, with lse -infinity. NaN stays.
//
// out, outs [..., rows, d] of one floating dtype; lse, lses [..., rows] f32 (f64); contiguous. out and lse
// may be those of a part.
void attention_merge(Stream stream, const TensorView& out, const TensorView& lse,
                     const std::vector<TensorView>& outs, const std::vector<TensorView>& lses);

// The CUDA half, on tensors that the function above has checked.
void attention_merge_cuda(Stream stream, const TensorView& out, const TensorView& lse,
                          const std::vector<TensorView>& outs, const std::vector<TensorView>& lses);

}  // namespace rfk
