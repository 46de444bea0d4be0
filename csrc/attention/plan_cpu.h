#pragma once

#include <algorithm>

#include "attention/call.h"
#include "attention/softmax.h"
#include "core/pack.h"

// How a call on the CPU is cut, and where its panels lie in the workspace.

namespace rfk {

// What the two products of a head multiply.
struct Products {
  Product scores, values;
};

inline Product product_of(DType t) {
  if (t == DType::f64) return Product::f64;
  return t == DType::bf16 && tiles().of(Product::bf16, kTile12x32) ? Product::bf16 : Product::f32;
}

// Of a head in eight bits, or in full. A factor multiplies weights that are no integers.
inline Products products_of(const AttentionCall& c, bool eight_bits) {
  const Product full = product_of(c.q.dtype);
  if (!eight_bits) return {full, full};
  if (c.precision != Precision::fp8 && !c.factor) return {Product::int8, Product::int8};
  return {Product::int8, tiles().of(Product::bf16, kTile12x32) ? Product::bf16 : Product::f32};
}

// Panels of the keys and values of one head: keys [tile][panel][steps][32] words with an offset and a scale
// each, values [tile][columns / 32 or 16][steps of keys][32 or 16] words with a scale a tile and column.
struct PanelLayout {
  Products products;
  int64_t d, steps;
  int64_t wide;  // panels of 32 columns
  bool narrow;   // and one of 16
  bool statistics;

  PanelLayout(Products p, int64_t d, bool statistics)
      : products(p),
        d(d),
        steps(ceil_div(d, numbers_of(p.scores))),
        wide(d / 32),
        narrow(d % 32 > 0),
        statistics(statistics) {
    if (d % 32 > 16) ++wide, narrow = false;
  }

  int word() const { return products.scores == Product::f64 ? 8 : 4; }
  int64_t columns() const { return 32 * wide + (narrow ? 16 : 0); }
  int64_t value_steps() const { return kWeightKeys / numbers_of(products.values); }
  bool codes() const { return products.scores == Product::int8; }
  bool value_codes() const { return products.values == Product::int8; }

  // Bytes of a tile.
  int64_t key_panel() const { return steps * kPanel * word(); }
  int64_t keys() const { return kPanels * key_panel(); }
  int64_t values() const { return value_steps() * columns() * word(); }
  int64_t key_numbers() const { return codes() ? 2 * kWeightKeys * 4 : 0; }  // offsets, then scales
  int64_t value_scales() const { return value_codes() ? lines(columns() * 4) : 0; }
  int64_t sums() const { return codes() ? lines(d * 4) + kLine : 0; }  // for the mean; statistics
  int64_t tile() const { return keys() + values() + key_numbers() + value_scales() + sums(); }
};

// Where the parts of a tile lie.
struct TilePanels {
  char *keys, *values;
  int32_t* offset;
  float *scale, *value_scale, *mean_sums;
  double* statistics;  // ErrorTerms of keys and values, as sums

  TilePanels(const PanelLayout& l, char* at) {
    keys = at;
    values = keys + l.keys();
    offset = reinterpret_cast<int32_t*>(values + l.values());
    scale = reinterpret_cast<float*>(offset + (l.codes() ? kWeightKeys : 0));
    value_scale = reinterpret_cast<float*>(reinterpret_cast<char*>(offset) + l.key_numbers());
    mean_sums = reinterpret_cast<float*>(reinterpret_cast<char*>(value_scale) + l.value_scales());
    statistics = reinterpret_cast<double*>(reinterpret_cast<char*>(mean_sums) + lines(l.d * 4));
  }
};

// Queries of one sample (or packed sequence) that share a kv head.
struct Problem {
  int64_t sequence, kv_head;
  int64_t row, rows, keys;  // the first row in q, and how many
  const char *k, *v;
  char* panels[2];  // of eight bits, in full; null where there are none
  int64_t first_tile, first_task;

  int64_t tiles() const { return ceil_div(keys, kWeightKeys); }
};

struct AttentionPlan {
  PanelLayout eight, full;
  bool with_eight, with_full;
  int threads;
  int64_t rows_per_task;
  int64_t region;  // bytes of the panels of a wave of heads

  static constexpr int64_t kMostProblems = 512;          // of a wave
  static constexpr int64_t kRegion = int64_t(16) << 20;  // a wave's panels should fit the last cache

  int64_t head(int64_t keys) const {
    const int64_t tile = (with_eight ? eight.tile() : 0) + (with_full ? full.tile() : 0);
    return ceil_div(keys, kWeightKeys) * tile;
  }
  int accumulator() const { return full.word(); }

  // Bytes of one thread: rows of queries as numbers and as panels with a factor each, sums of values, a tile
  // of scores, of weights, of the bias, and rows being decoded.
  int64_t row_tiles() const { return ceil_div(rows_per_task, kMostRows); }
  int64_t queries() const {
    return row_tiles() * kMostRows * std::max(eight.steps, full.steps) * accumulator();
  }
  int64_t factors() const { return row_tiles() * 2 * kRowSlots * accumulator(); }
  int64_t value_sums() const { return row_tiles() * kMostRows * full.columns() * accumulator(); }
  int64_t states() const {
    return row_tiles() * int64_t(accumulator() == 8 ? sizeof(RowState<double>) : sizeof(RowState<float>));
  }
  int64_t scores() const { return kMostRows * kWeightKeys * accumulator(); }
  int64_t weights() const { return kMostRows * weight_stride(Product::f32) * accumulator(); }
  int64_t decoded() const { return kPanel * lines((kMaxHeadDim + 4) * 8); }
  int64_t own() const {
    return lines(queries()) + lines(factors()) + lines(value_sums()) + lines(states()) + 2 * scores() +
           lines(weights()) + decoded();
  }
  int64_t workspace() const {
    return kLine + lines(kMostProblems * sizeof(Problem)) + region + threads * own();
  }
};

AttentionPlan plan_attention(const AttentionCall& call);

}  // namespace rfk
