#include "rope/heads.cuh"
#include "rope/qkv_norm_rope_backward.h"
#include "rope/rope.h"

namespace rfk {
namespace {

using namespace heads_cuda;

// Full width: vectors of a group in registers.
template <typename T> constexpr int kKeptOf = 8 / sizeof(T);

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

// Vector h of a token as the full width takes it: dy, turned back where there is a row, and x.
template <typename A> struct Turned {
  A g[kPack], x[kPack];

  template <bool kPacked, typename T>
  __device__ __forceinline__ void set(const Pack<T, kPack>& y_pack, const Pack<T, kPack>& x_pack,
                                      const A* row, const Lane& lane) {
#pragma unroll
    for (int j = 0; j < kPack; ++j) g[j] = load(y_pack.v[j]), x[j] = load(x_pack.v[j]);
    if (row) rotate_pack<kPacked>(g, row + lane.first, lane.count, Turn::back);
  }
};

// The same with a norm over the full width, token by token: a thread has its columns of dw in shared memory
// and kKept vectors of the token in registers; what is beyond it reads twice.
template <bool kPacked, typename T, typename M>
__global__ void __launch_bounds__(kFullThreads) qkv_full_norm_rope_backward_kernel(HeadPlan plan, int lanes) {
  using A = acc_t<T>;
  using Vector = Pack<T, kPack>;
  constexpr int kKept = kKeptOf<T>;
  const HeadPart& part = plan.part[blockIdx.y];
  const int64_t tokens = plan.batch * part.length;
  const int64_t begin = split_begin(tokens, blockIdx.x, gridDim.x);
  const int64_t end = split_begin(tokens, blockIdx.x + 1, gridDim.x);
  const Lane lane(plan.d, lanes, int(blockDim.x));
  const bool has_dy = part.y.data != nullptr, norm = part.weight != nullptr && has_dy;
  const M* weight = static_cast<const M*>(part.weight);
  auto* const sums = reinterpret_cast<Pack<A, kPack>*>(dynamic_shared<A>());  // [heads, lanes]
  const int mine = lane.first / kPack, width = part.heads * plan.d;
  const auto each_head = [&](int from, auto f) {
    for (int h = lane.group + from * lane.groups; h < part.heads; h += lane.groups) f(h);
  };
  if (part.dweight) each_head(0, [&](int h) { sums[h * lanes + mine] = {}; });

  for (int64_t t = begin; t < end; ++t) {
    const int64_t b = t / part.length, l = t % part.length;
    const A* row = has_dy ? plan.row<A>(part, b, l) : nullptr;
    const auto fetch = [&](const Heads& heads, bool wanted, int h) {
      if (!wanted || h >= part.heads || !lane.count) return Vector{};
      return load_pack<kPacked>(heads.at<T>(b, l, h) + lane.first, lane.count);
    };
    const auto weight_of = [&](int h) {
      return load_pack<kPacked>(weight + h * plan.d + lane.first, lane.count);
    };
    Vector y_kept[kKept], x_kept[kKept];
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      y_kept[k] = fetch(part.y, has_dy, lane.group + k * lane.groups);
      x_kept[k] = fetch(part.x, norm, lane.group + k * lane.groups);
    }
    A inv_rms = 0, mean = 0;
    if (norm) {
      A total[2] = {};  // of x^2, of u x
      const auto add = [&](const Vector& y_pack, const Vector& x_pack, int h) {
        if (h >= part.heads || !lane.count) return;
        Turned<A> v;
        v.template set<kPacked>(y_pack, x_pack, row, lane);
        const Pack<M, kPack> w = weight_of(h);
#pragma unroll
        for (int j = 0; j < kPack; ++j)
          total[0] += v.x[j] * v.x[j], total[1] += v.g[j] * load(w.v[j]) * v.x[j];
      };
#pragma unroll
      for (int k = 0; k < kKept; ++k) add(y_kept[k], x_kept[k], lane.group + k * lane.groups);
      each_head(kKept, [&](int h) { add(fetch(part.y, true, h), fetch(part.x, true, h), h); });
      block_sum(total);
      inv_rms = inverse_rms(total[0], width, A(plan.eps));
      mean = inv_rms * total[1] / A(width);
    }
    const auto finish = [&](Vector y_pack, const Vector& x_pack, int h) {
      if (h >= part.heads || !lane.count) return;
      if (norm || row) {
        Turned<A> v;
        v.template set<kPacked>(y_pack, x_pack, row, lane);
        if (norm) {
          const Pack<M, kPack> w = weight_of(h);
          Pack<A, kPack>& sum = sums[h * lanes + mine];
#pragma unroll
          for (int j = 0; j < kPack; ++j) {
            v.x[j] *= inv_rms;
            sum.v[j] += v.g[j] * v.x[j];
            v.g[j] = norm_backward(v.g[j] * load(w.v[j]), v.x[j], inv_rms, mean);
          }
        }
#pragma unroll
        for (int j = 0; j < kPack; ++j) y_pack.v[j] = store<T>(v.g[j]);
      }
      store_pack<kPacked>(part.dx.at<T>(b, l, h) + lane.first, y_pack, lane.count);
    };
#pragma unroll
    for (int k = 0; k < kKept; ++k) finish(y_kept[k], x_kept[k], lane.group + k * lane.groups);
    each_head(kKept, [&](int h) { finish(fetch(part.y, has_dy, h), fetch(part.x, norm, h), h); });
  }
  if (!part.dweight) return;
  A* const to = static_cast<A*>(part.dweight) + blockIdx.x * plan.split_stride + lane.first;
  each_head(0, [&](int h) { store_pack<false>(to + h * plan.d, sums[h * lanes + mine], lane.count); });
}

template <typename T, typename M>
void run(const char* op, cudaStream_t stream, const HeadPlan& plan, int lanes) {
  const bool packed = fits_packs(plan);
  const dim3 grid(unsigned(plan.splits), 3);
  if (plan.full_width) {
    constexpr int64_t kMostShared = 96 << 10;  // what every GPU has
    const int64_t shared = plan.part[0].heads * lanes * kPack * int64_t(sizeof(acc_t<T>));
    check(shared <= kMostShared, op, ": over the full width expected at most ",
          kMostShared / int64_t(sizeof(acc_t<T>)), " columns of q on CUDA, got ", plan.part[0].heads, " * ",
          plan.d);
    const auto kernel = packed ? qkv_full_norm_rope_backward_kernel<true, T, M>
                               : qkv_full_norm_rope_backward_kernel<false, T, M>;
    const unsigned threads = full_threads(plan.part[0].heads, lanes, kKeptOf<T>);
    return launch(op, kernel, grid, dim3(threads), size_t(shared), stream, plan, lanes);
  }
  const auto kernel =
      packed ? qkv_norm_rope_backward_kernel<true, T, M> : qkv_norm_rope_backward_kernel<false, T, M>;
  launch(op, kernel, grid, dim3(kThreads), 0, stream, plan, lanes);
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
  dispatch_heads(op, plan,
                 [&]<typename T, typename M>() { run<T, M>(op, cudaStream_t(stream), plan, lanes); });
}

}  // namespace rfk
