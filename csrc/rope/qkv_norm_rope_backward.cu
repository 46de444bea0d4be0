#include "rope/heads.cuh"
#include "rope/qkv_norm_rope_backward.h"
#include "rope/rope.h"

namespace rfk {
namespace {

using namespace heads_cuda;

// dx of this lane from g, which holds dy turned back and then u; adds g x^ to d_weight. All lanes meet.
template <typename A>
__device__ __forceinline__ void norm_pack_backward(A (&g)[kPack], A (&x)[kPack], const A (&w)[kPack],
                                                   A (&d_weight)[kPack], int d, int lanes, A eps) {
  A squares = 0, product = 0;
#pragma unroll
  for (int j = 0; j < kPack; ++j) squares += x[j] * x[j];
  const A inv_rms = inverse_rms(group_sum(squares, lanes), d, eps);
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    x[j] *= inv_rms;
    d_weight[j] += g[j] * x[j];
    g[j] *= w[j];
    product += g[j] * x[j];
  }
  const A mean = group_sum(product, lanes) / A(d);
#pragma unroll
  for (int j = 0; j < kPack; ++j) g[j] = norm_backward(g[j], x[j], inv_rms, mean);
}

// Adds up what the groups of a block have, in their order, and writes it.
template <typename A>
__device__ __forceinline__ void write_d_weight(A* to, const A (&d_weight)[kPack], const Lane& lane, int d) {
  alignas(16) __shared__ A sums[kThreads * kPack];  // [groups, lanes * kPack]
#pragma unroll
  for (int j = 0; j < kPack; ++j) sums[threadIdx.x * kPack + j] = d_weight[j];
  __syncthreads();
  for (int c = threadIdx.x; c < d; c += kThreads) {
    A sum = 0;
    for (int g = 0; g < lane.groups; ++g) sum += sums[g * lane.lanes * kPack + c];
    to[c] = sum;
  }
}

// Block (s, p) makes dx of split s of the tokens of part p, and its sum of dw.
template <bool kPacked, typename T, typename M>
__global__ void __launch_bounds__(kThreads) qkv_norm_rope_backward_kernel(HeadPlan plan, int lanes) {
  using A = acc_t<T>;
  const HeadPart& part = plan.part[blockIdx.y];
  const int64_t tokens = plan.batch * part.length;
  const int64_t begin = split_begin(tokens, blockIdx.x, gridDim.x);
  const unsigned vectors = unsigned(split_begin(tokens, blockIdx.x + 1, gridDim.x) - begin) * part.heads;
  const int64_t b0 = part.length ? begin / part.length : 0, l0 = begin - b0 * part.length;
  const Lane lane(plan.d, lanes);
  const bool has_dy = part.y.data != nullptr, norm = part.weight != nullptr;

  A w[kPack] = {}, d_weight[kPack] = {};
  if (norm && lane.count) {
    const M* weight = static_cast<const M*>(part.weight);
    const Pack<M, kPack> pack = load_pack<kPacked>(weight + lane.first, lane.count);
#pragma unroll
    for (int j = 0; j < kPack; ++j) w[j] = load(pack.v[j]);
  }
  for (unsigned base = 0; base < vectors; base += lane.groups) {
    const unsigned i = base + lane.group;
    const bool active = i < vectors && lane.count;
    const VectorIndex at(part, b0, l0, active ? i : 0);
    Pack<T, kPack> result{}, x_pack{};
    if (active && has_dy) {
      result = load_pack<kPacked>(part.y.at<T>(at.b, at.l, at.h) + lane.first, lane.count);
      if (norm) x_pack = load_pack<kPacked>(part.x.at<T>(at.b, at.l, at.h) + lane.first, lane.count);
    }
    const A* row = active && has_dy ? plan.row<A>(part, at.b, at.l) : nullptr;
    A g[kPack], x[kPack];
#pragma unroll
    for (int j = 0; j < kPack; ++j) g[j] = load(result.v[j]), x[j] = load(x_pack.v[j]);
    if (row) rotate_pack<kPacked>(g, row + lane.first, lane.count, Turn::back);
    if (norm && has_dy) norm_pack_backward(g, x, w, d_weight, plan.d, lanes, A(plan.eps));
    if (!active) continue;
    if (row || norm) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) result.v[j] = store<T>(g[j]);
    }
    store_pack<kPacked>(part.dx.at<T>(at.b, at.l, at.h) + lane.first, result, lane.count);
  }
  if (part.dweight)
    write_d_weight(static_cast<A*>(part.dweight) + blockIdx.x * plan.split_stride, d_weight, lane, plan.d);
}

}  // namespace

void qkv_norm_rope_backward_cuda(Stream stream, const TensorView& d_tokens, const TensorView& d_weights,
                                 const std::optional<TensorView>& dq, const std::optional<TensorView>& dk,
                                 const std::optional<TensorView>& dv, const std::vector<TensorView>& tensors,
                                 const std::vector<TensorView>& weights,
                                 const std::optional<TensorView>& rotation, int64_t per_stream, int64_t heads,
                                 int64_t kv_heads, int64_t start, int64_t rotate_from, double eps,
                                 const std::string& layout) {
  const char* op = "qkv_norm_rope_backward";
  const HeadArgs args{op, tensors, weights, rotation, per_stream, heads, kv_heads, start - rotate_from, eps};
  const HeadPlan plan = plan_qkv_norm_rope_backward(d_tokens, d_weights, dq, dk, dv, args, start, layout);
  const int lanes = lanes_for(plan.d);
  const DeviceGuard guard(d_tokens.device.index);
  dispatch_heads(op, plan, [&]<typename T, typename M>() {
    const auto kernel = fits_packs(plan) ? qkv_norm_rope_backward_kernel<true, T, M>
                                         : qkv_norm_rope_backward_kernel<false, T, M>;
    launch(op, kernel, dim3(unsigned(plan.splits), 3), dim3(kThreads), 0, cudaStream_t(stream), plan, lanes);
  });
}

}  // namespace rfk
