#pragma once

#include <utility>

#include "attention/pack_cpu.h"

// What one thread does of a call on the CPU.

namespace rfk {

// A thread's part of the workspace (plan_cpu.h).
struct Scratch {
  char *queries, *factors, *value_sums, *states, *scores, *bias, *weights, *decoded;

  Scratch(const AttentionPlan& p, char* at) {
    const auto take = [&](int64_t bytes) { return std::exchange(at, at + lines(bytes)); };
    queries = take(p.queries());
    factors = take(p.factors());
    value_sums = take(p.value_sums());
    states = take(p.states());
    scores = take(p.scores());
    bias = take(p.scores());
    weights = take(p.weights());
    decoded = take(p.decoded());
  }
};

// Rows first .. last of a problem for one of its heads, over all keys.
void attend(const AttentionCall& call, const AttentionPlan& plan, const Problem& problem, int64_t head,
            int64_t first, int64_t last, bool eight_bits, const Scratch& scratch);

inline HeadTokens queries_of(const AttentionCall& c, const Problem& p, int64_t head) {
  const TensorView& q = c.q;
  const int64_t sample = c.packed() ? 0 : p.sequence;
  const int64_t at = sample * q.stride[0] + head * q.stride[1] + p.row * q.stride[2];
  return {static_cast<const char*>(q.data) + at * size_of(q.dtype), q.stride[2] * size_of(q.dtype), c.d,
          q.dtype};
}

}  // namespace rfk
