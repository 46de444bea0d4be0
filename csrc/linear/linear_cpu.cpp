#include <algorithm>
#include <string>

#include "core/pack.h"
#include "core/threads.h"
#include "linear/epilogue_cpu.h"
#include "linear/gguf_cpu.h"
#include "linear/plan_cpu.h"

namespace rfk {
namespace {

const char* address(const TensorView& t, int64_t row) {
  return static_cast<const char*>(t.data) + row * t.stride[0] * size_of(t.dtype);
}

template <Product P, TileShape kShape> class Linear {
  using N = Numbers<P>;
  using Number = typename N::Number;
  using Word = typename N::Word;
  using A = typename N::A;
  static constexpr int R = kTileRows[kShape], C = kTileColumns[kShape];
  static constexpr Product kWide = P == Product::f64 ? P : Product::f32;
  static constexpr int kPerWord = numbers_of(P);

 public:
  Linear(const LinearCall& call, const LinearPlan& plan) : c_(call), p_(plan) {
    Arena arena{first_line(*call.workspace)};
    x_ = arena.take<Word>(p_.row_tiles * p_.x_tile());
    hidden_ = arena.take<char>(p_.row_tiles * p_.hidden_tile());
    inputs_ = arena.take<char>(p_.row_tiles * p_.sums_tile());
    own_ = arena.at;
  }

  void run() {
#pragma omp parallel num_threads(p_.threads)
    {
      Arena arena{own_ + thread_number() * p_.own()};
      Number* const decoded = arena.take<Number>(p_.decoded());
#pragma omp for schedule(static)
      for (int64_t t = 0; t < p_.row_tiles; ++t) pack_rows(t, decoded);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < p_.column_tasks * p_.row_tasks; ++task) run_task(task, decoded, arena);
    }
  }

 private:
  // What a task keeps of one panel of the weight.
  struct Panel {
    Word* words;
    Word* up;
    A *scale, *zero, *bias, *gate;  // scale and zero [groups][C]
    int32_t* offset;                // [groups][C], of integer sums
    int64_t gate_at;
  };

  // Tile t of x and of hidden, and the sums over groups of its rows.
  void pack_rows(int64_t t, Number* decoded) const {
    if (p_.four) {
      if constexpr (P == Product::bf16) permute_rows(t);
    } else if (!p_.direct) {
      const int64_t width = p_.steps * kPerWord;
      for (int r = 0; r < R; ++r) {
        const int64_t row = t * R + r, valid = row < c_.m ? c_.k : 0;
        Number* const to = decoded + r * width;
        if (valid) decode_x(to, address(c_.x, row));
        std::memset(static_cast<void*>(to + valid), 0, (width - valid) * sizeof(Number));
      }
      if constexpr (P != Product::int8)  // only floating tokens have zeros beside them
        if (p_.input_sums) sum_inputs(t, decoded, width);
      interleave(x_ + t * p_.x_tile() / p_.word(), reinterpret_cast<const Word*>(decoded), p_.steps, R,
                 p_.steps);
    }
    if (c_.rank) pack_branch(hidden_ + t * p_.hidden_tile(), *c_.hidden, t * R, R, decoded);
  }

  // Tokens in the order of tiles_int4_avx512.cpp, and the sums of eight neighbours.
  void permute_rows(int64_t t) const {
    auto* to = reinterpret_cast<bf16*>(x_ + t * p_.x_tile() / p_.word());
    auto* sums = reinterpret_cast<float*>(inputs_ + t * p_.sums_tile());
    const int rows = int(std::min<int64_t>(R, c_.m - t * R));
    for (int r = 0; r < rows; ++r) {
      const auto* x = reinterpret_cast<const bf16*>(address(c_.x, t * R + r));
      for (int64_t b = 0; b < c_.k; b += 128, to += 128)
        for (int i = 0; i < 128; ++i) to[i % 4 * 32 + i / 4] = x[b + i];
      for (int64_t i = 0; i < c_.k; i += 8) {
        float sum = 0;
        for (int q = 0; q < 8; ++q) sum += load(x[i + q]);
        *sums++ = sum;
      }
    }
  }

  void decode_x(Number* to, const char* from) const {
    if constexpr (P == Product::int8) {
      offset_row(to, from, c_.k);
    } else {
      decode_any(to, from, c_.x.dtype, c_.k);
    }
  }

  void sum_inputs(int64_t t, const Number* decoded, int64_t width) const {
    A* const to = reinterpret_cast<A*>(inputs_ + t * p_.sums_tile());
    for (int64_t g = 0; g < c_.groups; ++g)
      for (int r = 0; r < R; ++r) {
        A sum = 0;
        for (int64_t i = g * c_.group(); i < (g + 1) * c_.group(); ++i) sum += load(decoded[r * width + i]);
        to[g * R + r] = sum;
      }
  }

  // Rows first .. of hidden [., rank] or up [., rank], interleaved in the numbers of the branch.
  void pack_branch(void* to, const TensorView& from, int64_t first, int rows, void* decoded) const {
    const auto pack = [&]<typename B>(B, int per_word) {
      const int64_t width = p_.branch_steps * per_word;
      B* const d = static_cast<B*>(decoded);
      for (int r = 0; r < rows; ++r) {
        const int64_t valid = first + r < from.shape[0] ? c_.rank : 0;
        if (valid) decode_any(d + r * width, address(from, first + r), from.dtype, valid);
        std::memset(static_cast<void*>(d + r * width + valid), 0, (width - valid) * sizeof(B));
      }
      interleave(static_cast<Word*>(to), reinterpret_cast<const Word*>(d), p_.branch_steps, rows,
                 p_.branch_steps);
    };
    if constexpr (P == Product::f64)
      pack(double{}, 1);
    else if (p_.branch == Product::bf16)
      pack(bf16{}, 2);
    else
      pack(float{}, 1);
  }

  Panel pack_panel(int64_t panel, Number* decoded, Arena& arena) const {
    Panel to;
    to.words = arena.take<Word>(p_.panel());
    to.up = to.words + (p_.direct || p_.four ? 0 : p_.steps * C);
    Arena parameters{arena.take<char>(p_.parameters())};
    const int64_t table = c_.groups * C;
    to.scale = reinterpret_cast<A*>(parameters.at);
    to.zero = to.scale + table;
    to.bias = to.zero + table;
    to.gate = to.bias + C;
    to.offset = reinterpret_cast<int32_t*>(to.gate + C);
    to.gate_at = -1;
    std::fill(to.scale, to.gate + C, A(0));
    std::fill(to.offset, to.offset + table, 0);
    const int64_t first = panel * C;
    pack_weight(to, first, decoded);
    if (c_.bias) decode_any(to.bias, *c_.bias, first, std::min<int64_t>(C, c_.n - first));
    if (c_.rank) pack_branch(to.up, *c_.up, first, C, decoded);
    return to;
  }

  // Rows first .. of the weight and what belongs to them.
  void pack_weight(Panel& to, int64_t first, Number* decoded) const {
    if (p_.four) {
      if constexpr (P == Product::bf16) return read_groups(to, first);
    }
    const int64_t width = p_.steps * kPerWord;
    for (int i = 0; i < C; ++i) {
      const int64_t row = first + i, valid = row < c_.n ? c_.k : 0;
      if (p_.direct) {
        if (row < c_.n) read_parameters(to, i, row, reinterpret_cast<const Number*>(address(c_.weight, row)));
        continue;
      }
      Number* const d = decoded + i * width;
      if (valid) decode_weight(d, row);
      std::memset(static_cast<void*>(d + valid), 0, (width - valid) * sizeof(Number));
      if (row < c_.n) read_parameters(to, i, row, d);
    }
    if (!p_.direct) interleave(to.words, reinterpret_cast<const Word*>(decoded), p_.steps, C, p_.steps);
  }

  void decode_weight(Number* to, int64_t row) const {
    const char* const from = address(c_.weight, row);
    if (c_.storage == Storage::int4) {
      const int64_t g = c_.group();
      const bool integer = c_.weight_zero && c_.weight_zero->dtype == DType::u8;
      const auto* codes = reinterpret_cast<const uint8_t*>(from);
      if (!integer) return decode_int4(to, codes, 8, c_.k);
      for (int64_t i = 0; i < c_.groups; ++i)
        decode_int4(to + i * g, codes + i * g / 2,
                    reinterpret_cast<const uint8_t*>(address(*c_.weight_zero, row))[i], g);
      return;
    }
    if constexpr (P == Product::int8)
      std::memcpy(to, from, c_.k);
    else if (c_.storage == Storage::gguf)
      decode_gguf(to, from, c_.gguf, c_.k);
    else
      decode_any(to, from, c_.weight.dtype, c_.k);
  }

  // Column i of a panel, weight row `row`: scales, zeros, offsets.
  void read_parameters(Panel& to, int i, int64_t row, const Number* decoded) const {
    for (int64_t g = 0; g < c_.groups; ++g) {
      to.scale[g * C + i] =
          c_.weight_scale ? element(*c_.weight_scale, c_.scale_per_row ? row * c_.groups + g : 0) : 1;
      if (p_.input_sums) to.zero[g * C + i] = element(*c_.weight_zero, row * c_.groups + g);
      if constexpr (P == Product::int8)
        to.offset[g * C + i] = 128 * sum_row(decoded + g * c_.group(), c_.group());
    }
  }

  // Scales and zeros [C][groups] of W = (code - 8) scale + zero.
  void read_groups(Panel& to, int64_t first) const {
    const int64_t rows = std::min<int64_t>(C, c_.n - first), count = rows * c_.groups;
    if (c_.scale_per_row)
      decode_any(to.scale, *c_.weight_scale, first * c_.groups, count);
    else
      std::fill(to.scale, to.scale + count, element(*c_.weight_scale, 0));
    if (p_.input_sums)
      decode_any(to.zero, *c_.weight_zero, first * c_.groups, count);
    else if (c_.weight_zero)
      for (int64_t i = 0; i < count; ++i)
        to.zero[i] = A(8 - c_.weight_zero->ptr<uint8_t>()[first * c_.groups + i]) * to.scale[i];
  }

  static A element(const TensorView& t, int64_t at) {
    A v;
    decode_any(&v, t, at, 1);
    return v;
  }

  void run_task(int64_t task, Number* decoded, Arena arena) const {
    constexpr int kMost = 8;
    Panel panels[kMost];
    A* const tile = arena.take<A>(p_.tile());
    const int64_t first = task / p_.row_tasks * p_.panels_per_task;
    const int count = int(std::min(p_.panels_per_task, p_.panels - first));
    for (int i = 0; i < count; ++i) panels[i] = pack_panel(first + i, decoded, arena);
    const int64_t part = task % p_.row_tasks;
    for (int64_t t = p_.row_tiles * part / p_.row_tasks; t < p_.row_tiles * (part + 1) / p_.row_tasks; ++t)
      for (int i = 0; i < count; ++i) run_tile(t, (first + i) * C, panels[i], tile);
  }

  void run_tile(int64_t t, int64_t column, Panel& panel, A* tile) const {
    const int rows = int(std::min<int64_t>(R, c_.m - t * R));
    const int columns = int(std::min<int64_t>(C, c_.n - column));
    const bool scaled = P == Product::int8 || c_.weight_scale;
    const Into set = scaled ? Into::set_scaled : Into::set;
    if (p_.four) {
      if constexpr (P == Product::bf16) {
        const auto* codes = reinterpret_cast<const uint8_t*>(address(c_.weight, column));
        tiles().int4({c_.k, c_.groups, rows, columns,
                      reinterpret_cast<const uint16_t*>(x_ + t * p_.x_tile() / p_.word()),
                      reinterpret_cast<const float*>(inputs_ + t * p_.sums_tile()), codes, panel.scale,
                      c_.weight_zero ? panel.zero : nullptr, tile, C});
      }
    } else if (p_.direct) {
      const Matrix x{address(c_.x, t * R), c_.x.stride[0] * int64_t(sizeof(Number)), rows};
      const Matrix w{address(c_.weight, column), c_.k * int64_t(sizeof(Number)), columns};
      tiles().direct_of(P, kShape)(c_.k, x, w, tile, set, {panel.offset, panel.scale});
    } else {
      const Word* const x = x_ + t * p_.x_tile() / p_.word();
      const int64_t steps = p_.steps / c_.groups;
      for (int64_t g = 0; g < c_.groups; ++g)
        tiles().of(P, kShape)(steps, x + g * steps * R, panel.words + g * steps * C, tile,
                              g ? Into::add_scaled : set, {panel.offset + g * C, panel.scale + g * C});
    }
    if (p_.input_sums && !p_.four)  // the zeros: a product over the groups
      tiles().of(kWide, kShape)(c_.groups, inputs_ + t * p_.sums_tile(), panel.zero, tile, Into::add, {});
    if (c_.x_scale) scale_rows<C>(tile, rows, c_.x_scale->template ptr<float>() + t * R);
    if (c_.rank)
      tiles().of(p_.branch, kShape)(p_.branch_steps, hidden_ + t * p_.hidden_tile(), panel.up, tile,
                                    Into::add, {});
    Finish<C, A>{c_, panel.bias, panel.gate, panel.gate_at}(tile, t * R, column, rows, columns);
  }

  const LinearCall& c_;
  const LinearPlan& p_;
  Word* x_;
  char *hidden_, *inputs_, *own_;
};

}  // namespace

int64_t linear_workspace(const TensorView& x, const TensorView& weight, const Optional& weight_scale,
                         const Optional& weight_zero, const Optional& up) {
  if (x.device.type != DeviceType::cpu || x.ndim != 2 || weight.ndim != 2) return 0;
  LinearCall c{.x = x, .weight = weight, .weight_scale = weight_scale, .weight_zero = weight_zero, .up = up};
  read_shapes(c);
  return plan_linear(c).workspace();
}

void linear_cpu(const LinearCall& call) {
  const LinearPlan plan = plan_linear(call);
  const Optional& given = call.workspace;
  check(given && given->dtype == DType::u8 && given->is_contiguous() && given->numel() >= plan.workspace() &&
            given->device == call.x.device,
        "linear: workspace must be u8[", plan.workspace(), "], got ", given);
  const auto with_shape = [&]<Product P>() {
    if (plan.shape == kTile12x32) return Linear<P, kTile12x32>(call, plan).run();
    if (plan.shape == kTile4x32) return Linear<P, kTile4x32>(call, plan).run();
    Linear<P, kTile24x16>(call, plan).run();
  };
  switch (plan.product) {
    case Product::int8: return with_shape.template operator()<Product::int8>();
    case Product::bf16: return with_shape.template operator()<Product::bf16>();
    case Product::f32: return with_shape.template operator()<Product::f32>();
    case Product::f64: return with_shape.template operator()<Product::f64>();
  }
}

int64_t linear_roof(const std::string& product, int64_t repeats) {
  constexpr const char* kProducts[] = {"int8", "bf16", "f32"};
  const auto* found = std::find(std::begin(kProducts), std::end(kProducts), product);
  check(found != std::end(kProducts), "linear_roof: product must be int8, bf16 or f32, got ", product);
  const Product kind = Product(found - kProducts);
  const TileFunction multiply = tiles().of(kind, kTile12x32);
  check(multiply, "linear_roof: this CPU has no ", product, " products");
  constexpr int64_t kSteps = 128;
  int64_t threads = 0;
#pragma omp parallel reduction(+ : threads)
  {
    alignas(64) float a[kSteps * 12] = {}, b[kSteps * 32] = {}, c[12 * 32];
    ++threads;
    for (int64_t i = 0; i < repeats; ++i) multiply(kSteps, a, b, c, Into::set, {});
  }
  return threads * repeats * kSteps * 12 * 32 * 2 * numbers_of(kind);
}

}  // namespace rfk
