#pragma once

#include <cstdint>

#include "core/dispatch.h"
#include "rope/head.h"

// What a call works on: up to twelve parts (q, k and v of four streams), each the heads of one tensor.
// plan.h makes it of the tensors.

namespace rfk {

inline constexpr int kMaxStreams = 4, kMaxParts = 3 * kMaxStreams;

// Head vectors of [batch, tokens, heads, d], reached through strides in elements.
struct Heads {
  void* data = nullptr;
  int64_t sample = 0, token = 0, head = 0;

  template <typename T> RFK_HD T* at(int64_t b, int64_t l, int64_t h) const {
    return static_cast<T*>(data) + b * sample + l * token + h * head;
  }
};

struct HeadPart {
  Heads x, y, dx;                // y: the result, in the backward its gradient (null: zeros)
  const void* weight = nullptr;  // [d], full width [heads d]; null: no norm
  void* dweight = nullptr;       // backward: as long, of split 0, see HeadPlan; null for values
  int64_t length = 0;            // tokens of a sample
  int64_t row = 0, rows = 0;     // token l takes row `row + l` of the rotation if that is in 0 .. rows - 1
  int64_t first_block = 0;       // CUDA: where the blocks of this part begin
  int heads = 0;
};

struct HeadPlan {
  HeadPart part[kMaxParts];
  int parts = 0, d = 0;
  bool full_width = false;  // the norm is over all heads of a token
  int64_t batch = 0;
  const void* rotation = nullptr;  // [rows, d/2, 2] of (cos, sin)
  int64_t rotation_sample = 0, rotation_token = 0;
  int64_t splits = 0, split_stride = 0;  // backward: dweight is the sum of so many vectors, so far apart
  double eps = 0;
  Tier tier = Tier::fast;
  DType tokens = DType::f32, weights = DType::f32;

  int norm_width(const HeadPart& p) const { return full_width ? p.heads * d : d; }

  // The row of token l of sample b; null: it is not rotated.
  template <typename A> RFK_HD const A* row(const HeadPart& p, int64_t b, int64_t l) const {
    const int64_t r = p.row + l;
    if (r < 0 || r >= p.rows) return nullptr;
    return static_cast<const A*>(rotation) + b * rotation_sample + r * rotation_token;
  }
};

// Where split i of `splits` begins among `tokens` of them.
RFK_HD int64_t split_begin(int64_t tokens, int64_t i, int64_t splits) {
  const int64_t each = tokens / splits, more = tokens % splits;
  return i * each + (i < more ? i : more);
}

// Calls f.operator()<T, M>() for tokens of type T and weights of type M.
template <typename F> void dispatch_heads(const char* op, const HeadPlan& plan, F&& f) {
  dispatch_float(op, plan.tokens, [&]<typename T>() {
    if constexpr (sizeof(T) == 2)
      if (plan.weights == DType::f32) return f.template operator()<T, float>();
    f.template operator()<T, T>();
  });
}

}  // namespace rfk
