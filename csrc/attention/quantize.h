#pragma once

#include "attention/args.h"

// The way into eight bits on CUDA: where codes and scales lie in the workspace, and the kernels that write
// them.

namespace rfk {

inline constexpr int kSumTile = 512;              // keys of a partial sum of the mean
inline constexpr int kRowSums = 2, kKeySums = 4;  // of a tile, for the expected error: see ErrorTerms

// A mean square of a tile of tokens: of q |q|^2 and the square of its largest, of k and v these and |v|^2,
// and the squares of the steps of v.
struct Workspace {
  uint8_t *q = nullptr, *k = nullptr,
          *v = nullptr;  // codes [batch, heads, tokens, padded d]; EightBits::v_codes
  EightBits eight;
  float* key_sums = nullptr;  // [tile of 512, kv_heads, padded d]
  float *row_stats = nullptr,
        *key_stats = nullptr;  // [tile of 64, heads, kRowSums], [.., kv_heads, kKeySums]
  int64_t bytes = 0;
};

// Cuts `memory`, null to learn its size.
inline Workspace workspace_of(const AttentionArgs& a, int64_t batch, void* memory) {
  Workspace w;
  const int64_t d = padded_head(a.d, 1), row_tiles = a.row_tiles(kCodeTile).count() * a.heads,
                key_tiles = a.key_tiles(kCodeTile).count() * a.kv_heads,
                sum_tiles = a.key_tiles(kSumTile).count() * a.kv_heads;
  const auto take = [&]<typename T>(T*& part, int64_t count) {
    part = reinterpret_cast<T*>(static_cast<uint8_t*>(memory) + w.bytes);
    w.bytes += (count * int64_t(sizeof(T)) + 15) / 16 * 16;
  };
  take(w.q, batch * a.heads * a.rows * d);
  take(w.k, batch * a.kv_heads * a.keys * d);
  // Of float32 tensors V may become bf16 instead of codes, in the order of the tokens.
  take(w.v,
       std::max(key_tiles * d * kCodeTile, a.dtype == DType::f32 ? 2 * batch * a.kv_heads * a.keys * d : 0));
  take(w.eight.q_scale, batch * a.heads * a.rows);
  take(w.eight.q_mean, batch * a.heads * a.rows);
  take(w.eight.k_scale, key_tiles * kCodeTile);
  take(w.eight.v_scale, key_tiles * d);
  take(w.key_sums, sum_tiles * d);
  take(w.row_stats, row_tiles * kRowSums);
  take(w.key_stats, key_tiles * kKeySums);
  w.eight.v_codes = w.v;
  return w;
}

enum class ValuesBecome : uint8_t { nothing, int8, e4m3, bf16 };

struct Quantization {
  AttentionArgs args;  // of the tensors
  Workspace to;
  const float* key_mean = nullptr;  // [sequences, kv_heads, d], or null: the mean of the keys
  ValuesBecome values = ValuesBecome::int8;
  bool with_stats = false;
};

void attention_quantize(Stream stream, const Quantization& call);

// fell_back = 1 for the heads of which eight bits are expected to be wrong by more than kErrorBudget.
void attention_decide(Stream stream, const Quantization& call, uint8_t* fell_back);

}  // namespace rfk
