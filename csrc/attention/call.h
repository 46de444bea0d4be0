#pragma once

#include <cmath>
#include <string>

#include "attention/attention.h"
#include "core/hd.h"

namespace rfk {

using Optional = std::optional<TensorView>;

enum class Precision : uint8_t { full, int8, fp8, automatic };

inline constexpr int64_t kBlockRows = 128, kBlockKeys = 64;  // of a block mask
inline constexpr int64_t kMaxHeadDim = 256;

// A checked call. d is the last axis of q, k, v and out, with neighbours adjacent.
struct AttentionCall {
  TensorView out, lse, q, k, v;
  Optional bias, factor, key_lengths, q_starts, k_starts, block_mask, head_shift, key_mean, fell_back,
      workspace;
  double scale = 1;
  int64_t frames = 1;
  Precision precision = Precision::full;
  // What follows from the tensors. `sequences` is the batch, or the number of packed sequences.
  int64_t batch = 0, heads = 0, kv_heads = 0, rows = 0, keys = 0, d = 0, sequences = 0;

  bool packed() const { return q_starts.has_value(); }
  bool eight_bits() const { return precision != Precision::full; }
};

Precision precision_of(const std::string& name);

// Fills in what follows from the tensors of a call, which have their four axes.
inline void read_shapes(AttentionCall& c) {
  c.batch = c.q.shape[0];
  c.heads = c.q.shape[1];
  c.rows = c.q.shape[2];
  c.d = c.q.shape[3];
  c.kv_heads = c.k.shape[1];
  c.keys = c.k.shape[2];
  c.sequences = c.q_starts ? c.q_starts->shape[0] - 1 : c.batch;
}

// "auto": the relative error (L2) that eight bits are expected to make in the result of a head.
inline constexpr float kErrorBudget = 0.02f;

// Rounding to steps of t / 127 has the variance (t / 127)^2 / 12. A score q k^T is wrong by |q| times that of
// k and |k| times that of q, which a weight is by, relatively; v by its own. Arguments are means over
// tokens: of |q|^2, of the squares of the largest |q_i| of a token, the same of k - key_mean; of v^2, and of
// the squares of what its steps are made of.
struct ErrorTerms {
  float q_squares, q_top_squares, k_squares, k_top_squares, v_squares, v_top_squares;
};
RFK_HD float expected_error(const ErrorTerms& t, float scale) {
  const float scores = scale * scale * (t.q_squares * t.k_top_squares + t.k_squares * t.q_top_squares);
  const float values = t.v_squares > 0 ? t.v_top_squares / t.v_squares : t.v_top_squares;
  return std::sqrt((scores + values) * (1.0f / (127 * 127 * 12)));
}

// Sample whose keys and values kv head `head` of sample b takes.
RFK_HD int64_t source_sample(int64_t b, int64_t frames, int64_t shift) {
  const int64_t frame = b % frames + shift;
  return frame >= 0 && frame < frames ? b + shift : b;
}

void attention_cpu(const AttentionCall& call);
void attention_cuda(Stream stream, const AttentionCall& call);
int64_t attention_workspace_cpu(const AttentionCall& call);
int64_t attention_workspace_cuda(const AttentionCall& call);

}  // namespace rfk
