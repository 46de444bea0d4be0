#include <algorithm>
#include <limits>

#include "core/activation.h"
#include "core/dispatch.h"
#include "core/pack.h"
#include "core/threads.h"
#include "moe/grouped_linear.h"

// Rows of x, in the order of their slots, and panels of weights are decoded and interleaved (core/pack.h),
// multiplied (core/tiles.h) and finished. A tile never has rows of two experts.

namespace rfk {
namespace {

constexpr const char* kOp = "grouped_linear";

struct GroupedPlan {
  Product product;
  TileShape shape;
  int rows, columns, threads;  // rows and columns of a tile
  int lists;                   // of weights: two if gated
  int64_t steps, row_tiles, panels, panels_per_task;

  int64_t word() const { return product == Product::f64 ? 8 : 4; }
  int64_t x_tile() const { return steps * rows * word(); }
  int64_t panel() const { return lines(steps * columns * word()); }
  int64_t decoded() const { return lines(32 * steps * word()); }
  int64_t sums() const { return lines(int64_t(rows) * columns * word()); }
  int64_t own() const {
    return decoded() + panels_per_task * lists * panel() + lists * (sums() + lines(columns * word()));
  }
  int64_t workspace() const { return kLine + lines(row_tiles * x_tile()) + threads * own(); }
};

GroupedPlan plan_grouped(DType dtype, int64_t slots, int64_t n, int64_t k, int experts, bool gated) {
  GroupedPlan p{};
  p.product = dtype == DType::f64 ? Product::f64 : Product::f32;
  if (dtype == DType::bf16 && tiles().of(Product::bf16, kTile12x32)) p.product = Product::bf16;
  p.shape = slots <= kTileRows[kTile4x32] * experts ? kTile4x32 : kTile12x32;
  p.rows = kTileRows[p.shape], p.columns = kTileColumns[p.shape];
  p.threads = threads_for(slots * n * k);
  p.steps = ceil_div(k, numbers_of(p.product));
  p.row_tiles = slots / p.rows + experts;  // at most: every expert may leave one that is not full
  p.panels = ceil_div(n, p.columns);
  p.lists = gated ? 2 : 1;
  constexpr int64_t kPanelBytes = 384 << 10;  // of the second cache, beside a tile of x
  p.panels_per_task = std::clamp<int64_t>(kPanelBytes / (p.lists * p.panel()), 1, 8 / p.lists);
  return p;
}

// out = sums + bias, or silu of it times (up + up_bias), of a tile with C columns.
template <bool kGated, int C, typename T, typename A>
RFK_SIMD void finish_tile(T* out, int64_t stride, const A* sums, const A* bias, const A* up, const A* up_bias,
                          int rows, int columns) {
  for (int r = 0; r < rows; ++r)
#pragma omp simd
    for (int c = 0; c < columns; ++c) {
      A v = sums[r * C + c] + bias[c];
      if constexpr (kGated) v = activate(Activation::silu, v) * (up[r * C + c] + up_bias[c]);
      out[r * stride + c] = store<T>(acc_t<T>(v));
    }
}

template <Product P, TileShape kShape> class Grouped {
  using Number = typename Numbers<P>::Number;
  using Word = typename Numbers<P>::Word;
  using A = typename Numbers<P>::A;
  static constexpr int R = kTileRows[kShape], C = kTileColumns[kShape], kPerWord = numbers_of(P);

 public:
  Grouped(const GroupedCall& call, const GroupedPlan& plan) : c_(call), p_(plan) {
    Arena arena{first_line(*c_.workspace)};
    x_ = arena.take<Word>(p_.row_tiles * p_.x_tile());
    own_ = arena.at;
    const int32_t* const offsets = c_.offsets.ptr<int32_t>();
    for (int e = 0; e < c_.experts(); ++e)
      first_tile_[e + 1] = first_tile_[e] + ceil_div(offsets[e + 1] - offsets[e], R);
  }

  void run() {
    const int64_t per_expert = ceil_div(p_.panels, p_.panels_per_task), used = end_of(c_.experts() - 1);
#pragma omp parallel num_threads(p_.threads)
    {
      const Arena arena{own_ + thread_number() * p_.own()};
#pragma omp for schedule(static)
      for (int64_t t = 0; t < first_tile_[c_.experts()]; ++t) pack_rows(t, arena);
#pragma omp for schedule(dynamic) nowait
      for (int64_t task = 0; task < c_.experts() * per_expert; ++task)
        run_task(int(task / per_expert), task % per_expert * p_.panels_per_task, arena);
#pragma omp for schedule(static)
      for (int64_t s = used; s < c_.slots(); ++s)
        std::memset(address(c_.out, s), 0, c_.n() * size_of(c_.out.dtype));
    }
  }

 private:
  int64_t begin_of(int expert) const { return c_.offsets.ptr<int32_t>()[expert]; }
  int64_t end_of(int expert) const { return begin_of(expert + 1); }

  static char* address(const TensorView& t, int64_t row) {
    return static_cast<char*>(t.data) + row * t.stride[0] * size_of(t.dtype);
  }

  // Tile t of x: rows of one expert. A row that is not there is NaN.
  void pack_rows(int64_t t, Arena arena) const {
    Number* const decoded = arena.take<Number>(p_.decoded());
    const int expert = int(std::upper_bound(first_tile_, first_tile_ + c_.experts(), t) - first_tile_) - 1;
    const int64_t first = begin_of(expert) + (t - first_tile_[expert]) * R, width = p_.steps * kPerWord;
    for (int r = 0; r < R; ++r) {
      Number* const to = decoded + r * width;
      const int64_t slot = first + r, valid = slot < end_of(expert) ? c_.k() : 0;
      const int64_t row = !valid ? 0 : c_.index ? c_.index->ptr<int32_t>()[slot] : slot;
      if (row < 0 || row >= c_.x.shape[0])
        std::fill(to, to + valid, store<Number>(std::numeric_limits<A>::quiet_NaN()));
      else if (valid)
        decode_any(to, address(c_.x, row), c_.x.dtype, valid);
      std::memset(static_cast<void*>(to + valid), 0, (width - valid) * sizeof(Number));
    }
    interleave(x_ + t * p_.steps * R, reinterpret_cast<const Word*>(decoded), p_.steps, R, p_.steps);
  }

  // Rows first .. of a weight as a panel; as they lie, where that needs no conversion.
  void pack_panel(Word* to, const TensorView& weight, int64_t first, Number* decoded) const {
    constexpr DType kStored[] = {DType::i8, DType::bf16, DType::f32, DType::f64};
    const int64_t width = p_.steps * kPerWord, there = std::min<int64_t>(C, c_.n() - first);
    if (there == C && width == c_.k() && weight.dtype == kStored[int(P)])
      return interleave(to, reinterpret_cast<const Word*>(address(weight, first)), p_.steps, C, p_.steps);
    for (int i = 0; i < C; ++i) {
      const int64_t valid = i < there ? c_.k() : 0;
      if (valid) decode_any(decoded + i * width, address(weight, first + i), weight.dtype, valid);
      std::memset(static_cast<void*>(decoded + i * width + valid), 0, (width - valid) * sizeof(Number));
    }
    interleave(to, reinterpret_cast<const Word*>(decoded), p_.steps, C, p_.steps);
  }

  // The panels from `first_panel` on of an expert, times all of its rows.
  void run_task(int expert, int64_t first_panel, Arena arena) const {
    const int64_t tiles_end = first_tile_[expert + 1];
    if (first_tile_[expert] == tiles_end) return;
    Number* const decoded = arena.take<Number>(p_.decoded());
    const int64_t count = std::min(p_.panels_per_task, p_.panels - first_panel);
    Word* panels[8];
    for (int64_t i = 0; i < count * p_.lists; ++i) {
      const TensorView& weight = (i % p_.lists ? c_.up : c_.weights)[expert];
      pack_panel(panels[i] = arena.take<Word>(p_.panel()), weight, (first_panel + i / p_.lists) * C, decoded);
    }
    for (int64_t t = first_tile_[expert]; t < tiles_end; ++t)
      for (int64_t i = 0; i < count; ++i)
        run_tile(expert, t, (first_panel + i) * C, panels + i * p_.lists, arena);
  }

  void run_tile(int expert, int64_t t, int64_t column, Word* const* panels, Arena arena) const {
    const int64_t row = begin_of(expert) + (t - first_tile_[expert]) * R;
    const int rows = int(std::min<int64_t>(R, end_of(expert) - row));
    const int columns = int(std::min<int64_t>(C, c_.n() - column));
    A *sums[2] = {}, *bias[2] = {};
    for (int i = 0; i < p_.lists; ++i) {
      sums[i] = arena.take<A>(p_.sums()), bias[i] = arena.take<A>(C * sizeof(A));
      tiles().of(P, kShape)(p_.steps, x_ + t * p_.steps * R, panels[i], sums[i], Into::set, {});
      std::fill(bias[i], bias[i] + C, A(0));
      const auto& given = i ? c_.up_bias : c_.bias;
      if (!given.empty()) decode_any(bias[i], given[expert], column, columns);
    }
    dispatch_float(kOp, c_.out.dtype, [&]<typename T>() {
      T* const out = reinterpret_cast<T*>(address(c_.out, row)) + column;
      const auto finish = c_.gated() ? finish_tile<true, C, T, A> : finish_tile<false, C, T, A>;
      finish(out, c_.out.stride[0], sums[0], bias[0], sums[1], bias[1], rows, columns);
    });
  }

  const GroupedCall& c_;
  const GroupedPlan& p_;
  Word* x_;
  char* own_;
  int64_t first_tile_[kMaxExperts + 1] = {};  // of an expert
};

void check_offsets(const GroupedCall& c) {
  const int32_t* const at = c.offsets.ptr<int32_t>();
  const bool rising = std::is_sorted(at, at + c.experts() + 1);
  check(at[0] == 0 && rising && at[c.experts()] <= c.slots(), kOp,
        ": offsets must rise from 0 to at most the ", c.slots(), " slots, got ", at[0], " .. ",
        at[c.experts()], rising ? "" : " falling in between");
}

}  // namespace

int64_t grouped_linear_workspace(const TensorView& x, const std::vector<TensorView>& weights, int64_t slots,
                                 bool gated) {
  if (x.device.type != DeviceType::cpu || x.ndim != 2 || weights.empty() || weights[0].ndim != 2) return 0;
  return plan_grouped(x.dtype, slots, weights[0].shape[0], x.shape[1], int(weights.size()), gated)
      .workspace();
}

void grouped_linear_cpu(const GroupedCall& call) {
  check_offsets(call);
  const GroupedPlan plan =
      plan_grouped(call.x.dtype, call.slots(), call.n(), call.k(), call.experts(), call.gated());
  const Optional& given = call.workspace;
  check(given && given->dtype == DType::u8 && given->is_contiguous() && given->numel() >= plan.workspace() &&
            given->device == call.x.device,
        kOp, ": workspace must be u8[", plan.workspace(), "], got ", given);
  const auto with_product = [&]<Product P>() {
    if (plan.shape == kTile4x32) return Grouped<P, kTile4x32>(call, plan).run();
    Grouped<P, kTile12x32>(call, plan).run();
  };
  switch (plan.product) {
    case Product::f64: return with_product.template operator()<Product::f64>();
    case Product::bf16: return with_product.template operator()<Product::bf16>();
    default: return with_product.template operator()<Product::f32>();
  }
}

}  // namespace rfk
