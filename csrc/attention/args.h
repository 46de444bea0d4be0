#pragma once

#include "attention/call.h"
#include "attention/tile_choice.h"

// What the CUDA kernels of the room get of a call.

namespace rfk {

inline constexpr int kCodeTile = 64;  // tokens that are encoded together: keys of one scale of a channel of v

// [batch, heads, tokens, d], strides in elements.
struct Tokens {
  void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;

  Tokens() = default;
  Tokens(void* data, int64_t batch, int64_t head, int64_t token)
      : data(data), batch(batch), head(head), token(token) {}
  explicit Tokens(const TensorView& t) : Tokens(t.data, t.stride[0], t.stride[1], t.stride[2]) {}

  RFK_HD int64_t at(int64_t b, int64_t h, int64_t i) const { return b * batch + h * head + i * token; }
};

// A table [batch | 1, heads | 1, rows | 1, keys]: the stride of an axis of one is 0.
struct KeyTable {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t batch = 0, head = 0, row = 0;

  KeyTable() = default;
  explicit KeyTable(const Optional& t) {
    if (!t) return;
    const auto stride = [&](int axis) { return t->shape[axis] == 1 ? 0 : t->stride[axis]; };
    data = t->data, dtype = t->dtype;
    batch = stride(0), head = stride(1), row = stride(2);
  }
  RFK_HD int64_t at(int64_t b, int64_t h, int64_t i) const { return b * batch + h * head + i * row; }
};

// Tiles of `size` tokens. Those of packed sequence s begin at number starts[s] / size + s, which leaves every
// sequence as many as it needs, whatever its length, and is found without adding up.
struct Tiling {
  const int32_t* starts;  // or null: every sample has `tokens`
  int tokens, sequences, size;

  RFK_HD int64_t of_sample() const {
    return starts ? int64_t(tokens) / size + sequences : (int64_t(tokens) + size - 1) / size;
  }
  RFK_HD int64_t count() const { return starts ? of_sample() : sequences * of_sample(); }
  RFK_HD int64_t first(int s) const {
    return starts ? int64_t(starts[s]) / size + s : int64_t(s) * of_sample();
  }
  RFK_HD int sequence(int64_t tile) const {
    if (!starts) return int(tile / of_sample());
    int low = 0, high = sequences;  // first(low) <= tile < first(high)
    while (high - low > 1) {
      const int middle = low + (high - low) / 2;
      (first(middle) <= tile ? low : high) = middle;
    }
    return low;
  }
};

struct Span {
  int first, length;
};

// What eight bits need beside the codes, which are `q`, `k` and `v` of the kernels that multiply them.
struct EightBits {
  float *q_scale = nullptr, *q_mean = nullptr;  // [batch, heads, rows]; q_mean: scale q (mean of the keys)
  float* k_scale = nullptr;                     // [tile, kv_heads, 64]
  float* v_scale = nullptr;                     // [tile, kv_heads, padded d]
  uint8_t* v_codes = nullptr;                   // [tile, kv_heads, padded d, 64 keys in the order of an mma]
};

struct AttentionArgs {
  int heads, kv_heads, group, rows, keys, d, sequences;
  int64_t frames;
  double scale;
  float unit;   // of scores, in base 2: scale log2(e)
  DType dtype;  // of the result
  Tokens q, k, v, out;
  bool pieces;  // q, k and v may be read by 16 bytes
  bool v_pieces;
  bool out_pairs;  // two elements of the result may be written at once
  void* lse;
  KeyTable bias, block_mask;
  const void* factor;
  int64_t factor_head;
  const int32_t *key_lengths, *q_starts, *k_starts, *head_shift;
  EightBits eight;
  const uint8_t* fell_back;  // [sequences, heads]: heads whose byte is not `takes` are left to another kernel
  uint8_t takes;

  RFK_HD bool packed() const { return q_starts; }
  RFK_HD int sample_of(int s) const { return packed() ? 0 : s; }
  RFK_HD Tiling row_tiles(int size) const { return {q_starts, rows, sequences, size}; }
  RFK_HD Tiling key_tiles(int size) const { return {k_starts, keys, sequences, size}; }
  RFK_HD Span rows_of(int s) const {
    return packed() ? Span{q_starts[s], q_starts[s + 1] - q_starts[s]} : Span{0, rows};
  }
  RFK_HD Span keys_of(int s) const {
    return packed() ? Span{k_starts[s], k_starts[s + 1] - k_starts[s]}
                    : Span{0, key_lengths ? key_lengths[s] : keys};
  }
  // Scores can be scaled where they are exponentiated: there is nothing to be added to them, and what is
  // hidden stays -infinity.
  RFK_HD bool scales_late() const { return !bias.data && unit > 1e-6f; }
};

inline AttentionArgs attention_args(const AttentionCall& c) {
  AttentionArgs a{};
  a.heads = int(c.heads), a.kv_heads = int(c.kv_heads), a.group = int(c.heads / c.kv_heads);
  a.rows = int(c.rows), a.keys = int(c.keys), a.d = int(c.d), a.sequences = int(c.sequences);
  a.frames = c.frames;
  a.scale = c.scale, a.unit = float(c.scale * 1.4426950408889634);
  a.dtype = c.q.dtype;
  a.q = Tokens(c.q), a.k = Tokens(c.k), a.v = Tokens(c.v), a.out = Tokens(c.out);
  const int64_t size = size_of(c.q.dtype);
  const auto aligned = [&](const Tokens& t, int64_t bytes) {
    return (reinterpret_cast<uintptr_t>(t.data) | uint64_t((t.batch | t.head | t.token | c.d) * size)) %
               bytes ==
           0;
  };
  a.pieces = aligned(a.q, 16) && aligned(a.k, 16);
  a.v_pieces = aligned(a.v, 16);
  a.out_pairs = aligned(a.out, 2 * size);
  a.lse = c.lse.data;
  a.bias = KeyTable(c.bias), a.block_mask = KeyTable(c.block_mask);
  if (c.factor) a.factor = c.factor->data, a.factor_head = c.factor->shape[0] == 1 ? 0 : c.factor->shape[1];
  const auto integers = [](const Optional& t) { return t ? t->ptr<const int32_t>() : nullptr; };
  a.key_lengths = integers(c.key_lengths), a.head_shift = integers(c.head_shift);
  a.q_starts = integers(c.q_starts), a.k_starts = integers(c.k_starts);
  return a;
}

}  // namespace rfk
