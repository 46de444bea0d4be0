#include "moe/moe_route.h"

#include <cmath>

#include "core/backend.h"

namespace rfk {
namespace {

constexpr const char* kOp = "moe_route";

void check_route(const TensorView& weights, const TensorView& experts, const TensorView& offsets,
                 const TensorView& order, const TensorView& slots, const TensorView& logits,
                 const std::optional<int64_t>& capacity, const std::optional<double>& threshold) {
  check(logits.ndim == 2 && is_floating(logits.dtype) && 1 <= logits.shape[1] &&
            logits.shape[1] <= kMaxExperts && (logits.shape[1] == 1 || logits.stride[1] == 1),
        kOp, ": logits must be floating [rows, experts] with 1..", kMaxExperts,
        " experts, adjacent along the last axis, got ", logits);
  const int64_t rows = logits.shape[0], count = logits.shape[1];
  const int64_t k = weights.ndim == 2 ? weights.shape[1] : 0;
  check(1 <= k && k <= count, kOp, ": top_k must be 1..", count, ", the experts of logits ", logits, ", got ",
        k);
  check(rows * k < int64_t(1) << 31, kOp, ": rows x top_k must be below 2^31, got ", logits, " and ", k);
  check(weights.dtype == acc_of(logits.dtype) && weights.has_shape({rows, k}), kOp, ": weights must be ",
        name_of(acc_of(logits.dtype)), "[", rows, ", ", k, "], got ", weights);
  const auto integers = [&](const char* name, const TensorView& t, std::initializer_list<int64_t> shape) {
    check(t.dtype == DType::i32 && t.has_shape(shape), kOp, ": ", name, " must be i32 of ", rows, " rows, ",
          count, " experts and top_k ", k, ", got ", t);
  };
  integers("experts", experts, {rows, k});
  integers("offsets", offsets, {count + 1});
  integers("order", order, {rows * k});
  integers("slots", slots, {rows, k});
  check_dense(kOp, weights, {&experts, &offsets, &order, &slots});
  check(weights.device == logits.device, kOp, ": expected all tensors on one device, got ", logits, " and ",
        weights);
  check(!capacity || *capacity >= 0, kOp, ": capacity must be at least 0, got ", capacity.value_or(0));
  check(!threshold || (*threshold > 0 && *threshold <= 1), kOp, ": threshold must be in (0, 1], got ",
        threshold.value_or(0));
}

// First choices of all rows come before any second choice.
template <typename T> void drop_over_capacity(const Route<T>& route, int64_t rows, int64_t capacity) {
  int64_t counts[kMaxExperts] = {};
  for (int j = 0; j < route.top_k; ++j)
    for (int64_t at = j; at < rows * route.top_k; at += route.top_k) {
      if (route.experts[at] < 0 || counts[route.experts[at]]++ < capacity) continue;
      route.experts[at] = -1;
      route.weights[at] = 0;
    }
}

// A stable counting sort of the choices by expert, those without one last.
void place(const int32_t* experts, int64_t choices, int count, int32_t* offsets, int32_t* order,
           int32_t* slots) {
  int32_t next[kMaxExperts + 1] = {};
  const auto key = [&](int64_t i) { return experts[i] < 0 ? count : experts[i]; };
  for (int64_t i = 0; i < choices; ++i) ++next[key(i)];
  int32_t begin = 0;
  for (int e = 0; e <= count; ++e) {
    offsets[e] = begin;
    begin += next[e];
    next[e] = offsets[e];
  }
  for (int64_t i = 0; i < choices; ++i) order[slots[i] = next[key(i)]++] = int32_t(i);
}

}  // namespace

void moe_route(Stream stream, const TensorView& weights, const TensorView& experts, const TensorView& offsets,
               const TensorView& order, const TensorView& slots, const TensorView& logits,
               const std::optional<int64_t>& capacity, bool normalize,
               const std::optional<double>& threshold) {
  check_route(weights, experts, offsets, order, slots, logits, capacity, threshold);
  if (logits.device.type == DeviceType::cpu) {
    const int64_t rows = logits.shape[0];
    with_route(weights, experts, logits, normalize, threshold, [&](const auto& route) {
#pragma omp parallel for schedule(static) if (rows * route.count > 1 << 14)
      for (int64_t row = 0; row < rows; ++row) route(row);
      if (capacity) drop_over_capacity(route, rows, *capacity);
    });
    return place(experts.ptr<int32_t>(), order.numel(), int(logits.shape[1]), offsets.ptr<int32_t>(),
                 order.ptr<int32_t>(), slots.ptr<int32_t>());
  }
  if constexpr (kWithCuda)
    return moe_route_cuda(stream, weights, experts, offsets, order, slots, logits, capacity, normalize,
                          threshold);
  fail_without_cuda(kOp);
}

}  // namespace rfk
