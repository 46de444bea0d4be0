#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/tensor.h"

// Rotary position embedding: from the projection of a transformer block to the queries, keys and values of
// its attention. head.h has the maths. Nothing here allocates.
//
// tensors: per stream one tensor qkv [batch, tokens, (heads + 2 kv_heads) d] (per_stream 1), or three (3):
//   q [batch, tokens, heads d] or [batch, tokens, heads, d], k and v likewise of kv_heads. f64, f32, f16 or
//   bf16; neighbours along the last axis adjacent, other axes through any strides. One to four streams.
// weights: none, or two per stream, of q and k: [d] for a norm per head, or all [heads d], [kv_heads d] for
// one
//   over the full width; of the dtype of the tokens, or f32 beside 16-bit tokens; an empty one: no norm.
// rotation: (cos, sin) [rows, d/2, 2] or [batch, rows, d/2, 2], f32, for f64 tokens f64.
// layout: "bhld" for results [batch, heads, tokens, d], "blhd" for [batch, tokens, heads, d].

namespace rfk {

// q, k, v: the streams one after the other along the tokens, q and k normalised and rotated:
// tokens rotate_from .. rotate_from + rows - 1 of the joint sequence. tier: where a 16-bit result rounds,
// "fast", "exact" or "exact_before_weight" (head.h). Without with_v v is [0] and values are not read.
void qkv_norm_rope(Stream stream, const TensorView& q, const TensorView& k, const TensorView& v,
                   const std::vector<TensorView>& tensors, const std::vector<TensorView>& weights,
                   const std::optional<TensorView>& rotation, int64_t per_stream, int64_t heads,
                   int64_t kv_heads, int64_t rotate_from, double eps, const std::string& layout,
                   const std::string& tier, bool with_v);

// The gradient of one stream, whose tokens begin at `start` of the joint sequence: d_tokens
// [batch, tokens, (heads + 2 kv_heads) d] of q, k and v side by side; d_weights [splits, n] in the
// accumulator's dtype, whose sum over the splits is that of the weights of q and k side by side (zero where
// there is none): n = 2 d, full width (heads + kv_heads) d.
// dq, dk, dv: gradients of the joint results; an absent one is zero.
void qkv_norm_rope_backward(Stream stream, const TensorView& d_tokens, const TensorView& d_weights,
                            const std::optional<TensorView>& dq, const std::optional<TensorView>& dk,
                            const std::optional<TensorView>& dv, const std::vector<TensorView>& tensors,
                            const std::vector<TensorView>& weights, const std::optional<TensorView>& rotation,
                            int64_t per_stream, int64_t heads, int64_t kv_heads, int64_t start,
                            int64_t rotate_from, double eps, const std::string& layout);

// The CUDA halves. They check their arguments as the functions above do.
void qkv_norm_rope_cuda(Stream stream, const TensorView& q, const TensorView& k, const TensorView& v,
                        const std::vector<TensorView>& tensors, const std::vector<TensorView>& weights,
                        const std::optional<TensorView>& rotation, int64_t per_stream, int64_t heads,
                        int64_t kv_heads, int64_t rotate_from, double eps, const std::string& layout,
                        const std::string& tier, bool with_v);
void qkv_norm_rope_backward_cuda(Stream stream, const TensorView& d_tokens, const TensorView& d_weights,
                                 const std::optional<TensorView>& dq, const std::optional<TensorView>& dk,
                                 const std::optional<TensorView>& dv, const std::vector<TensorView>& tensors,
                                 const std::vector<TensorView>& weights,
                                 const std::optional<TensorView>& rotation, int64_t per_stream, int64_t heads,
                                 int64_t kv_heads, int64_t start, int64_t rotate_from, double eps,
                                 const std::string& layout);

}  // namespace rfk
