#ifdef _OPENMP
#include <omp.h>
#endif

#include "attention/attend_cpu.h"
#include "core/dispatch.h"

namespace rfk {
namespace {

// A call in waves of heads, as many as the workspace holds: their panels are packed by all threads, then
// their queries are tasks of a few tiles of rows.
class Waves {
 public:
  Waves(const AttentionCall& c, const AttentionPlan& p) : c_(c), p_(p) {
    char* const at = first_line(*c.workspace);
    problems_ = reinterpret_cast<Problem*>(at);
    region_ = at + lines(AttentionPlan::kMostProblems * sizeof(Problem));
    threads_ = region_ + p.region;
  }

  void run() {
    while (next_ < c_.sequences * c_.kv_heads) {
      fill();
#pragma omp parallel num_threads(p_.threads)
      {
#ifdef _OPENMP
        const Scratch scratch(p_, threads_ + omp_get_thread_num() * p_.own());
#else
        const Scratch scratch(p_, threads_);
#endif
        pack(scratch);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks_; ++task) run_task(task, scratch);
      }
    }
  }

 private:
  int64_t group() const { return c_.heads / c_.kv_heads; }
  int64_t blocks(const Problem& p) const { return ceil_div(p.rows, p_.rows_per_task); }

  Problem problem(int64_t index) const {
    Problem p{};
    p.sequence = index / c_.kv_heads;
    p.kv_head = index % c_.kv_heads;
    int64_t sample = p.sequence, key = 0;
    p.rows = c_.rows;
    p.keys = c_.keys;
    if (c_.packed()) {
      const int32_t *q = c_.q_starts->ptr<int32_t>() + sample, *k = c_.k_starts->ptr<int32_t>() + sample;
      p.row = q[0], p.rows = q[1] - q[0];
      key = k[0], p.keys = k[1] - k[0];
      sample = 0;
    } else {
      if (c_.head_shift) sample = source_sample(sample, c_.frames, c_.head_shift->ptr<int32_t>()[p.kv_head]);
      if (c_.key_lengths) p.keys = c_.key_lengths->ptr<int32_t>()[sample];
    }
    const auto start = [&](const TensorView& t) {
      const int64_t at = sample * t.stride[0] + p.kv_head * t.stride[1] + key * t.stride[2];
      return static_cast<const char*>(t.data) + at * size_of(t.dtype);
    };
    p.k = start(c_.k);
    p.v = start(c_.v);
    return p;
  }

  // The next heads whose panels fit.
  void fill() {
    count_ = tiles_ = tasks_ = 0;
    int64_t used = 0;
    for (; next_ < c_.sequences * c_.kv_heads && count_ < AttentionPlan::kMostProblems; ++next_) {
      Problem p = problem(next_);
      if (p.rows == 0) continue;
      if (used + p_.head(p.keys) > p_.region) break;
      p.panels[0] = region_ + used;
      p.panels[1] = p.panels[0] + (p_.with_eight ? p.tiles() * p_.eight.tile() : 0);
      used += p_.head(p.keys);
      p.first_tile = tiles_;
      p.first_task = tasks_;
      tiles_ += p.tiles();
      tasks_ += group() * blocks(p);
      problems_[count_++] = p;
    }
  }

  template <int64_t Problem::* First> const Problem& problem_of(int64_t index) const {
    const auto behind = [](int64_t i, const Problem& p) { return i < p.*First; };
    return *(std::upper_bound(problems_, problems_ + count_, index, behind) - 1);
  }

  HeadTokens keys(const Problem& p) const {
    return {p.k, c_.k.stride[2] * size_of(c_.k.dtype), c_.d, c_.k.dtype};
  }
  HeadTokens values(const Problem& p) const {
    return {p.v, c_.v.stride[2] * size_of(c_.v.dtype), c_.d, c_.v.dtype};
  }
  int64_t tile_of(const Problem& p, int64_t index) const { return index - p.first_tile; }
  int64_t keys_of(const Problem& p, int64_t tile) const {
    return std::min<int64_t>(kWeightKeys, p.keys - tile * kWeightKeys);
  }
  TilePanels eight(const Problem& p, int64_t tile) const {
    return TilePanels(p_.eight, p.panels[0] + tile * p_.eight.tile());
  }

  void pack(const Scratch& scratch) {
    if (p_.with_eight) {
      if (!c_.key_mean) {
#pragma omp for
        for (int64_t i = 0; i < tiles_; ++i) sum_keys(i);
      }
#pragma omp for
      for (int64_t i = 0; i < count_; ++i) find_mean(problems_[i]);
#pragma omp for
      for (int64_t i = 0; i < tiles_; ++i) pack_eight(i, scratch);
    }
    if (c_.fell_back) {
#pragma omp for
      for (int64_t i = 0; i < count_ * group(); ++i) decide(problems_[i / group()], i % group());
    }
    if (p_.with_full) {
#pragma omp for
      for (int64_t i = 0; i < tiles_; ++i) pack_full(i, scratch);
    }
  }

  void sum_keys(int64_t index) const {
    const Problem& p = problem_of<&Problem::first_tile>(index);
    const int64_t tile = tile_of(p, index);
    float* const sums = eight(p, tile).mean_sums;
    std::fill(sums, sums + padded(c_.d), 0.0f);
    add_finite(sums, keys(p), tile * kWeightKeys, keys_of(p, tile));
  }

  // The mean of the keys goes where the sums of the first tile were. What is not finite counts as 0.
  void find_mean(const Problem& p) const {
    if (p.keys == 0) return;
    float* const mean = eight(p, 0).mean_sums;
    if (c_.key_mean) {
      const float* given = c_.key_mean->ptr<float>() + (p.sequence * c_.kv_heads + p.kv_head) * c_.d;
      std::fill(mean, mean + padded(c_.d), 0.0f);
      for (int64_t i = 0; i < c_.d; ++i) mean[i] = std::isfinite(given[i]) ? given[i] : 0.0f;
      return;
    }
    for (int64_t tile = 1; tile < p.tiles(); ++tile) {
      const float* const sums = eight(p, tile).mean_sums;
      for (int64_t i = 0; i < c_.d; ++i) mean[i] += sums[i];
    }
    for (int64_t i = 0; i < c_.d; ++i) mean[i] /= float(p.keys);
  }

  void pack_eight(int64_t index, const Scratch& scratch) const {
    const Problem& p = problem_of<&Problem::first_tile>(index);
    const int64_t tile = tile_of(p, index), count = keys_of(p, tile);
    const TilePanels to = eight(p, tile);
    const PackFunctions pack = pack_functions(p_.eight.products);
    std::fill(to.scale, to.scale + kWeightKeys, 0.0f);
    std::fill(to.statistics, to.statistics + 4, 0.0);  // of values that are no codes
    pack.values(p_.eight, to, values(p), tile * kWeightKeys, count, scratch.decoded);
    pack.keys(p_.eight, to, keys(p), tile * kWeightKeys, count, eight(p, 0).mean_sums, scratch.decoded);
  }

  void pack_full(int64_t index, const Scratch& scratch) const {
    const Problem& p = problem_of<&Problem::first_tile>(index);
    if (c_.fell_back) {
      bool any = false;
      for (int64_t g = 0; g < group(); ++g) any |= fell_back(p, g);
      if (!any) return;
    }
    const int64_t tile = tile_of(p, index), count = keys_of(p, tile);
    const TilePanels to(p_.full, p.panels[1] + tile * p_.full.tile());
    const PackFunctions pack = pack_functions(p_.full.products);
    pack.values(p_.full, to, values(p), tile * kWeightKeys, count, scratch.decoded);
    pack.keys(p_.full, to, keys(p), tile * kWeightKeys, count, nullptr, scratch.decoded);
  }

  uint8_t& fell_back(const Problem& p, int64_t g) const {
    return c_.fell_back->ptr<uint8_t>()[p.sequence * c_.heads + p.kv_head * group() + g];
  }

  void decide(const Problem& p, int64_t g) const {
    double sums[4] = {}, q_squares = 0, q_tops = 0;
    for (int64_t tile = 0; tile < p.tiles(); ++tile)
      for (int i = 0; i < 4; ++i) sums[i] += eight(p, tile).statistics[i];
    const HeadTokens q = queries_of(c_, p, p.kv_head * group() + g);
    const float zeros[kMaxHeadDim] = {};
    dispatch_float("attention", q.dtype, [&]<typename T>() {
      for (int64_t i = 0; i < p.rows; ++i) {
        const CodedRow coded = code_row<RowIs::squares>(nullptr, q.row_of<T>(i), zeros, 1.0f, c_.d);
        q_squares += coded.squares, q_tops += double(coded.top) * coded.top;
      }
    });
    const double rows = double(p.rows), keys = double(std::max<int64_t>(p.keys, 1));
    const float error = expected_error({float(q_squares / rows), float(q_tops / rows), float(sums[0] / keys),
                                        float(sums[1] / keys), float(sums[2] / keys), float(sums[3] / keys)},
                                       float(c_.scale));
    fell_back(p, g) = !(error <= kErrorBudget);
  }

  void run_task(int64_t task, const Scratch& scratch) const {
    const Problem& p = problem_of<&Problem::first_task>(task);
    const int64_t g = (task - p.first_task) / blocks(p), block = (task - p.first_task) % blocks(p);
    const int64_t first = block * p_.rows_per_task, last = std::min(p.rows, first + p_.rows_per_task);
    const bool eight_bits = c_.eight_bits() && !(c_.fell_back && fell_back(p, g));
    attend(c_, p_, p, p.kv_head * group() + g, first, last, eight_bits, scratch);
  }

  const AttentionCall& c_;
  const AttentionPlan& p_;
  Problem* problems_;
  char *region_, *threads_;
  int64_t next_ = 0, count_ = 0, tiles_ = 0, tasks_ = 0;
};

}  // namespace

void attention_cpu(const AttentionCall& call) {
  const AttentionPlan plan = plan_attention(call);
  Waves(call, plan).run();
}

}  // namespace rfk
