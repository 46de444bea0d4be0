#include "attention/attend_cpu.h"

#include "core/dispatch.h"
#include "core/math.h"

namespace rfk {
namespace {

constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

template <typename A> RFK_SIMD void multiply(A* v, A by, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) v[i] *= by;
}

// Rows of a panel of sums, by what the tile of keys makes of them.
template <int Width, typename A> RFK_SIMD void rescale(A* sums, const A* by, int rows) {
  for (int i = 0; i < rows; ++i)
    if (by[i] != 1)
#pragma omp simd
      for (int j = 0; j < Width; ++j) sums[i * Width + j] *= by[i];
}

// What is left to do with the sums of a row: their factor, and the logarithm of the sum of exponentials.
template <typename A> struct Ends {
  A by[kRowSlots], lse[kRowSlots];
};

template <typename A> RFK_SIMD void find_ends(Ends<A>& ends, const RowState<A>& s, const A* shift) {
  constexpr A kLowest = -std::numeric_limits<A>::infinity();
#pragma omp simd
  for (int i = 0; i < kRowSlots; ++i) {
    const bool none = s.top[i] == kLowest && s.sum[i] == 0;
    ends.by[i] = none ? A(0) : 1 / s.sum[i];
    const A lse = s.top[i] * A(kLn2) + log_(s.exact[i]) + shift[i];
    ends.lse[i] = none ? kLowest : lse;
  }
}

template <int Width, typename T, typename A>
RFK_SIMD void write_rows(T* out, int64_t stride, const A* sums, const A* by, int rows, int columns) {
  for (int i = 0; i < rows; ++i, out += stride, sums += Width) {
    if (columns == Width) {
#pragma omp simd
      for (int j = 0; j < Width; ++j) out[j] = store<T>(sums[j] * by[i]);
    } else {
      for (int j = 0; j < columns; ++j) out[j] = store<T>(sums[j] * by[i]);
    }
  }
}

template <Product S> auto softmax_of(Product weights) {
  if constexpr (S == Product::f64) {
    return &softmax_f64;
  } else {
#ifdef __x86_64__
    const VectorSet set = tiles().vectors;
    const SoftmaxFunctions& all = set == VectorSet::avx512 ? kSoftmaxAvx512
                                  : set == VectorSet::avx2 ? kSoftmaxAvx2
                                                           : kSoftmaxGeneric;
#else
    const SoftmaxFunctions& all = kSoftmaxGeneric;
#endif
    return all.of[int(weights)];
  }
}

// Rows of one head in tiles of twelve, the last of four where that is enough.
template <Product S> class Attend {
  using Number = typename Numbers<S>::Number;
  using Word = typename Numbers<S>::Word;
  using A = typename Numbers<S>::A;
  static constexpr bool kCodes = S == Product::int8;

 public:
  Attend(const AttentionCall& c, const PanelLayout& l, const Problem& p, int64_t head, int64_t first,
         int64_t last, char* panels, const Scratch& s)
      : c_(c),
        l_(l),
        p_(p),
        s_(s),
        head_(head),
        first_(first),
        last_(last),
        panels_(panels),
        softmax_(softmax_of<S>(l.products.values)) {}

  void run() {
    for (int64_t t = 0; t < row_tiles(); ++t) pack_queries(t);
    bool fresh = true;  // sums of values are 0
    for (int64_t tile = 0; tile < p_.tiles(); ++tile) {
      const TilePanels panels(l_, panels_ + tile * l_.tile());
      find_panels(tile);
      if (count_ == 0) continue;
      for (int64_t t = 0; t < row_tiles(); ++t) add_tile(t, tile, panels, fresh);
      fresh = false;
    }
    dispatch_float("attention", c_.out.dtype, [&]<typename T>() {
      if constexpr (std::is_same_v<acc_t<T>, A>)
        for (int64_t t = 0; t < row_tiles(); ++t) write<T>(t);
    });
  }

 private:
  int64_t row_tiles() const { return ceil_div(last_ - first_, kMostRows); }
  int rows(int64_t t) const { return int(std::min<int64_t>(kMostRows, last_ - first_ - t * kMostRows)); }
  int stride(int64_t t) const { return rows(t) <= 4 ? 4 : kMostRows; }
  Word* queries(int64_t t) const { return reinterpret_cast<Word*>(s_.queries) + t * kMostRows * l_.steps; }
  A* factors(int64_t t) const { return reinterpret_cast<A*>(s_.factors) + t * 2 * kRowSlots; }
  A* shifts(int64_t t) const { return factors(t) + kRowSlots; }  // scale q key_mean, which codes leave out
  RowState<A>& state(int64_t t) const { return reinterpret_cast<RowState<A>*>(s_.states)[t]; }
  A* sums(int64_t t) const { return reinterpret_cast<A*>(s_.value_sums) + t * kMostRows * l_.columns(); }
  int64_t sample() const { return c_.packed() ? 0 : p_.sequence; }

  void pack_queries(int64_t t) const {
    const HeadTokens q = queries_of(c_, p_, head_);
    const int64_t width = l_.steps * numbers_of(S);
    Number* const numbers = reinterpret_cast<Number*>(s_.decoded);
    const A by = A(c_.scale == 0 ? kLog2e : std::fabs(c_.scale) * kLog2e);
    for (int i = 0; i < stride(t); ++i) {
      Number* const n = numbers + i * width;
      factors(t)[i] = by;
      shifts(t)[i] = 0;
      if (i >= rows(t)) {
        std::memset(static_cast<void*>(n), 0, width * sizeof(Number));
      } else if constexpr (kCodes) {
        const CodedRow coded = code_query(n, q, first_ + t * kMostRows + i);
        factors(t)[i] *= coded.scale;
        shifts(t)[i] = A(std::fabs(c_.scale)) * coded.dot;
      } else {
        decode_row(n, q, first_ + t * kMostRows + i, width);
        if (c_.scale <= 0)
          for (int64_t j = 0; j < l_.d; ++j) n[j] = store<Number>(load(n[j]) * sign());
      }
    }
    interleave(queries(t), reinterpret_cast<const Word*>(numbers), l_.steps, stride(t), l_.steps);
    RowState<A>& s = state(t);
    std::fill(std::begin(s.top), std::end(s.top), -std::numeric_limits<A>::infinity());
    std::fill(std::begin(s.sum), std::end(s.sum), A(0));
    std::fill(std::begin(s.exact), std::end(s.exact), A(0));
    std::fill(sums(t), sums(t) + stride(t) * l_.columns(), A(0));
  }

  // Factors are positive: the sign of the scale, or its being 0, goes to the queries.
  A sign() const { return c_.scale > 0 ? 1 : c_.scale < 0 ? -1 : 0; }

  CodedRow code_query(int8_t* codes, const HeadTokens& q, int64_t row) const {
    static constexpr float kZeros[kMaxHeadDim] = {};
    const float* const mean = p_.keys ? TilePanels(l_, panels_).mean_sums : kZeros;
    CodedRow coded;
    dispatch_float("attention", q.dtype, [&]<typename T>() {
      coded = code_row<RowIs::query>(codes, q.row_of<T>(row), mean, float(sign()), l_.d);
    });
    return coded;
  }

  // The panels of a tile that the rows see: all, or blocks of them.
  void find_panels(int64_t tile) {
    const int64_t keys = std::min<int64_t>(kWeightKeys, p_.keys - tile * kWeightKeys);
    const int all = int(ceil_div(keys, kPanel));
    count_ = 0;
    for (int panel = 0; panel < all; ++panel)
      if (sees(tile * kWeightKeys + panel * kPanel))
        panels_seen_[count_] = panel, keys_[count_++] = panel * kPanel;
    tail_ = kPanel;
    if (count_ > 0 && panels_seen_[count_ - 1] == all - 1) tail_ = int(keys - (all - 1) * kPanel);
  }

  bool sees(int64_t key) const {
    if (!c_.block_mask) return true;
    const TensorView& m = *c_.block_mask;
    const int64_t at = (m.shape[0] > 1 ? p_.sequence * m.stride[0] : 0) +
                       (m.shape[1] > 1 ? head_ * m.stride[1] : 0) + first_ / kBlockRows * m.stride[2] +
                       key / kBlockKeys * m.stride[3];
    return m.ptr<uint8_t>()[at] != 0;
  }

  void add_tile(int64_t t, int64_t tile, const TilePanels& panels, bool fresh) const {
    const TileShape shape = stride(t) == 4 ? kTile4x32 : kTile12x32;
    const TileFunction multiply_scores = tiles().of(S, shape);
    A* const scores = reinterpret_cast<A*>(s_.scores);
    for (int i = 0; i < count_; ++i) {
      const int panel = panels_seen_[i];
      multiply_scores(l_.steps, queries(t), panels.keys + panel * l_.key_panel(),
                      scores + i * stride(t) * kPanel, kCodes ? Into::set_scaled : Into::set,
                      {panels.offset + panel * kPanel, panels.scale + panel * kPanel, nullptr});
    }
    SoftmaxTile<A> s{rows(t), stride(t),   count_,  tail_, scores,     factors(t),
                     nullptr, kWeightKeys, nullptr, keys_, s_.weights, &state(t)};
    if (c_.bias) read_bias(s, t, tile);
    if (c_.factor) read_factor(s, t, tile);
    softmax_(s);
    add_values(t, panels, fresh);
  }

  // One row for all is read with the first rows of a tile and stays.
  void read_bias(SoftmaxTile<A>& s, int64_t t, int64_t tile) const {
    const TensorView& b = *c_.bias;
    A* const to = reinterpret_cast<A*>(s_.bias);
    const bool by_row = b.shape[2] > 1;
    s.bias = to;
    if (!by_row) s.bias_stride = 0;
    if (!by_row && t > 0) return;
    for (int64_t i = 0; i < (by_row ? rows(t) : 1); ++i) {
      const int64_t row = by_row ? first_ + t * kMostRows + i : 0;
      const int64_t at = (b.shape[0] > 1 ? p_.sequence * b.stride[0] : 0) +
                         (b.shape[1] > 1 ? head_ * b.stride[1] : 0) + row * b.stride[2] + tile * kWeightKeys;
      for (int panel = 0; panel < count_; ++panel) {
        A* const out = to + i * kWeightKeys + panel * kPanel;
        const int there = panel == count_ - 1 ? tail_ : kPanel;
        decode_any(out, b, at + keys_[panel], there);
        std::fill(out + there, out + kPanel, A(0));
      }
      multiply(to + i * kWeightKeys, A(kLog2e), count_ * kPanel);
    }
  }

  // The entries that the tile needs, ones behind the last key.
  void read_factor(SoftmaxTile<A>& s, int64_t t, int64_t tile) const {
    const TensorView& f = *c_.factor;
    const int64_t entries = f.shape[1],
                  lowest = tile * kWeightKeys - (first_ + t * kMostRows + rows(t) - 1) + c_.rows - 1;
    const A* const table = f.ptr<A>() + (f.shape[0] > 1 ? head_ * entries : 0) + lowest;
    A* const to = reinterpret_cast<A*>(s_.decoded);
    const int64_t wanted = kWeightKeys + rows(t) - 1, there = std::min(wanted, entries - lowest);
    std::copy(table, table + there, to);
    std::fill(to + there, to + wanted, A(1));
    s.relative = to + rows(t) - 1;
  }

  void add_values(int64_t t, const TilePanels& panels, bool fresh) const {
    const RowState<A>& s = state(t);
    const int r = stride(t);
    const Product product = l_.products.values;
    const int64_t panel_steps = kPanel / numbers_of(product), tile_steps = l_.value_steps();
    const int word = l_.word();
    int64_t column = 0;
    for (int64_t j = 0; column < l_.columns(); ++j) {
      const int width = j < l_.wide ? 32 : 16;
      A* const to = sums(t) + r * column;
      if (!fresh) width == 32 ? rescale<32>(to, s.rescale, rows(t)) : rescale<16>(to, s.rescale, rows(t));
      const ValueShape shape =
          r == 4 ? (width == 32 ? kValues4x32 : kValues4x16) : (width == 32 ? kValues12x32 : kValues12x16);
      const TileFunction add = tiles()[product].values[shape];
      const char* const values = panels.values + tile_steps * column * word;
      for (int i = 0; i < count_;) {  // runs of neighbouring panels
        int end = i + 1;
        while (end < count_ && panels_seen_[end] == panels_seen_[end - 1] + 1) ++end;
        const int64_t steps = (end - i) * panel_steps;
        add(l_.value_codes() ? ceil_div(steps, 16) * 16 : steps, s_.weights + i * panel_steps * word,
            values + panels_seen_[i] * panel_steps * width * word, to,
            l_.value_codes() ? Into::add_scaled_by_row : Into::add,
            {panels.offset, panels.value_scale + column, reinterpret_cast<const float*>(s.step)});
        i = end;
      }
      column += width;
    }
  }

  template <typename T> void write(int64_t t) const {
    Ends<A> ends;
    find_ends(ends, state(t), shifts(t));
    const int64_t row = p_.row + first_ + t * kMostRows;
    std::copy(ends.lse, ends.lse + rows(t), c_.lse.ptr<A>() + (sample() * c_.heads + head_) * c_.rows + row);
    const int64_t stride_out = c_.out.stride[2];
    T* const out =
        c_.out.ptr<T>() + sample() * c_.out.stride[0] + head_ * c_.out.stride[1] + row * stride_out;
    for (int64_t column = 0; column < l_.d; column += 32) {
      const A* const from = sums(t) + stride(t) * column;
      const int columns = int(std::min<int64_t>(32, l_.d - column));
      column < 32 * l_.wide ? write_rows<32>(out + column, stride_out, from, ends.by, rows(t), columns)
                            : write_rows<16>(out + column, stride_out, from, ends.by, rows(t), columns);
    }
  }

  const AttentionCall& c_;
  const PanelLayout& l_;
  const Problem& p_;
  const Scratch& s_;
  int64_t head_, first_, last_;
  char* panels_;
  decltype(softmax_of<S>(Product::f32)) softmax_;
  int panels_seen_[kPanels], keys_[kPanels], count_ = 0, tail_ = kPanel;
};

}  // namespace

void attend(const AttentionCall& call, const AttentionPlan& plan, const Problem& problem, int64_t head,
            int64_t first, int64_t last, bool eight_bits, const Scratch& scratch) {
  const PanelLayout& layout = eight_bits ? plan.eight : plan.full;
  char* const panels = problem.panels[eight_bits ? 0 : 1];
  const auto with = [&]<Product S>() {
    Attend<S>(call, layout, problem, head, first, last, panels, scratch).run();
  };
  switch (layout.products.scores) {
    case Product::int8: return with.template operator()<Product::int8>();
    case Product::bf16: return with.template operator()<Product::bf16>();
    case Product::f32: return with.template operator()<Product::f32>();
    case Product::f64: return with.template operator()<Product::f64>();
  }
}

}  // namespace rfk
