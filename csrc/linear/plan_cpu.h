#pragma once

#include <algorithm>

#include "core/pack.h"
#include "linear/call.h"

// How a product on the CPU is cut, and where its panels lie in the workspace.

namespace rfk {

// The numbers that a product multiplies: 16-bit where the CPU has them and nothing is lost.
inline Product product_of(DType x, DType other) {
  if (x == DType::f64) return Product::f64;
  const auto exact = [](DType t) { return t == DType::bf16 || t == DType::i8 || t == DType::u8; };
  if (x == DType::i8 && (other == DType::i8 || other == DType::u8)) return Product::int8;
  const bool bf16 = exact(x) && exact(other) && tiles().of(Product::bf16, kTile12x32);
  return bf16 ? Product::bf16 : Product::f32;
}

struct LinearPlan {
  Product product, branch;
  TileShape shape;
  int rows, columns, threads;       // rows and columns of a tile
  int64_t steps, branch_steps = 0;  // words along k
  int64_t row_tiles, panels;        // of x, of the weight
  int64_t panels_per_task, column_tasks, row_tasks;
  int64_t groups;
  bool four;        // four-bit codes as they lie in memory, for few tokens
  bool direct;      // without panels of x and of the weight
  bool input_sums;  // the weight has a floating zero

  int word() const { return product == Product::f64 ? 8 : 4; }
  int accumulator() const { return product == Product::f64 ? 8 : 4; }

  // Sizes in bytes. Of all threads:
  int64_t x_tile() const { return direct ? 0 : steps * rows * word(); }
  int64_t hidden_tile() const { return branch_steps * rows * word(); }
  int64_t sums_tile() const {
    return four ? lines(rows * steps) : input_sums ? lines(groups * rows * accumulator()) : 0;
  }
  int64_t shared() const { return row_tiles * (x_tile() + hidden_tile() + sums_tile()) + 3 * kLine; }
  // Of one thread: rows being decoded, a task's panels and its columns' parameters, a tile.
  int64_t decoded() const { return lines(32 * std::max(steps, branch_steps) * word()); }
  int64_t panel() const { return ((direct || four ? 0 : steps) + branch_steps) * columns * word(); }
  int64_t parameters() const { return (2 * groups + 2) * columns * accumulator() + groups * columns * 4; }
  int64_t tile() const { return int64_t(rows) * columns * accumulator(); }
  int64_t own() const {
    return decoded() + panels_per_task * (lines(panel()) + lines(parameters())) + lines(tile());
  }
  int64_t workspace() const { return kLine + lines(shared()) + threads * own(); }
};

LinearPlan plan_linear(const LinearCall& call);

}  // namespace rfk
