#include "rope/heads.cuh"
#include "rope/qkv_norm_rope.h"
#include "rope/rope.h"

namespace rfk {
namespace {

using namespace heads_cuda;

// Vectors of a group in registers.
template <typename T> constexpr int kKeptOf = sizeof(T) == 8 ? 2 : 4;

// A block makes y of `tile` tokens of one part, so that the heads of a token find its row of the rotation
// in L1. The next vector of a group is under way while it works on one.
template <bool kPacked, typename T, typename M>
__global__ void __launch_bounds__(kThreads) qkv_norm_rope_kernel(HeadPlan plan, int lanes, int tile) {
  using A = acc_t<T>;
  int p = 0;
  while (p + 1 < plan.parts && plan.part[p + 1].first_block <= blockIdx.x) ++p;
  const HeadPart& part = plan.part[p];
  const int64_t begin = (blockIdx.x - part.first_block) * tile, tokens = plan.batch * part.length;
  const int64_t b0 = begin / part.length, l0 = begin % part.length;
  const int vectors = int(tokens - begin < tile ? tokens - begin : tile) * part.heads;
  const Lane lane(plan.d, lanes);
  const M* weight = static_cast<const M*>(part.weight);

  A w[kPack] = {};
  if (weight && lane.count) {
    const Pack<M, kPack> pack = load_pack<kPacked>(weight + lane.first, lane.count);
#pragma unroll
    for (int j = 0; j < kPack; ++j) w[j] = load(pack.v[j]);
  }
  const auto fetch = [&](int i) {
    if (i >= vectors || !lane.count) return Pack<T, kPack>{};
    const VectorIndex at(part, b0, l0, i);
    return load_pack<kPacked>(part.x.at<T>(at.b, at.l, at.h) + lane.first, lane.count);
  };
  Pack<T, kPack> next = fetch(lane.group);
  for (int base = 0; base < vectors; base += lane.groups) {
    const int i = base + lane.group;
    const Pack<T, kPack> pack = next;
    next = fetch(i + lane.groups);
    A x[kPack];
#pragma unroll
    for (int j = 0; j < kPack; ++j) x[j] = load(pack.v[j]);
    if (weight) {
      A squares = 0;
#pragma unroll
      for (int j = 0; j < kPack; ++j) squares += x[j] * x[j];
      const A inv_rms = inverse_rms(group_sum(squares, lanes), plan.d, A(plan.eps));
#pragma unroll
      for (int j = 0; j < kPack; ++j) x[j] = normalise<T, M>(x[j], inv_rms, w[j], plan.tier);
    }
    if (i >= vectors || !lane.count) continue;
    const VectorIndex at(part, b0, l0, i);
    const A* row = plan.row<A>(part, at.b, at.l);
    if (row) rotate_pack<kPacked>(x, row + lane.first, lane.count, Turn::forth);
    Pack<T, kPack> result = pack;  // bit for bit what is neither normalised nor turned
    if (weight || row) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) result.v[j] = store<T>(x[j]);
    }
    store_pack<kPacked>(part.y.at<T>(at.b, at.l, at.h) + lane.first, result, lane.count);
  }
}

// The same, normed over the full width: a block makes y of one token of one part. A group has its vectors
// in registers, as many as kKept, and reads what is beyond again.
template <bool kPacked, typename T, typename M>
__global__ void __launch_bounds__(kFullThreads) qkv_full_norm_rope_kernel(HeadPlan plan, int lanes) {
  using A = acc_t<T>;
  using Vector = Pack<T, kPack>;
  constexpr int kKept = kKeptOf<T>;
  int p = 0;
  while (p + 1 < plan.parts && plan.part[p + 1].first_block <= blockIdx.x) ++p;
  const HeadPart& part = plan.part[p];
  const int64_t token = blockIdx.x - part.first_block, b = token / part.length, l = token % part.length;
  const Lane lane(plan.d, lanes, int(blockDim.x));
  const M* weight = static_cast<const M*>(part.weight);
  const A* row = plan.row<A>(part, b, l);

  const auto fetch = [&](int h) {
    if (h >= part.heads || !lane.count) return Vector{};
    return load_pack<kPacked>(part.x.at<T>(b, l, h) + lane.first, lane.count);
  };
  Vector kept[kKept];
#pragma unroll
  for (int k = 0; k < kKept; ++k) kept[k] = fetch(lane.group + k * lane.groups);
  A inv_rms = 0;
  if (weight) {
    A squares[1] = {};
    const auto add = [&](const Vector& pack) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) squares[0] += load(pack.v[j]) * load(pack.v[j]);
    };
#pragma unroll
    for (int k = 0; k < kKept; ++k) add(kept[k]);
    for (int h = lane.group + kKept * lane.groups; h < part.heads; h += lane.groups) add(fetch(h));
    block_sum(squares);
    inv_rms = inverse_rms(squares[0], part.heads * plan.d, A(plan.eps));
  }
  const auto finish = [&](Vector pack, int h) {
    if (h >= part.heads || !lane.count) return;
    if (weight || row) {
      A x[kPack];
#pragma unroll
      for (int j = 0; j < kPack; ++j) x[j] = load(pack.v[j]);
      if (weight) {
        const Pack<M, kPack> w = load_pack<kPacked>(weight + h * plan.d + lane.first, lane.count);
#pragma unroll
        for (int j = 0; j < kPack; ++j) x[j] = normalise<T, M>(x[j], inv_rms, load(w.v[j]), plan.tier);
      }
      if (row) rotate_pack<kPacked>(x, row + lane.first, lane.count, Turn::forth);
#pragma unroll
      for (int j = 0; j < kPack; ++j) pack.v[j] = store<T>(x[j]);
    }
    store_pack<kPacked>(part.y.at<T>(b, l, h) + lane.first, pack, lane.count);
  };
#pragma unroll
  for (int k = 0; k < kKept; ++k) finish(kept[k], lane.group + k * lane.groups);
  for (int h = lane.group + kKept * lane.groups; h < part.heads; h += lane.groups) finish(fetch(h), h);
}

template <typename T, typename M>
void run(const char* op, cudaStream_t stream, const HeadPlan& plan, unsigned blocks, int lanes, int tile) {
  const bool packed = fits_packs(plan);
  if (plan.full_width) {
    const auto kernel =
        packed ? qkv_full_norm_rope_kernel<true, T, M> : qkv_full_norm_rope_kernel<false, T, M>;
    const unsigned threads = full_threads(plan.part[0].heads, lanes, kKeptOf<T>);
    return launch(op, kernel, dim3(blocks), dim3(threads), 0, stream, plan, lanes);
  }
  const auto kernel = packed ? qkv_norm_rope_kernel<true, T, M> : qkv_norm_rope_kernel<false, T, M>;
  launch(op, kernel, dim3(blocks), dim3(kThreads), 0, stream, plan, lanes, tile);
}

}  // namespace

void qkv_norm_rope_cuda(Stream stream, const TensorView& q, const TensorView& k, const TensorView& v,
                        const std::vector<TensorView>& tensors, const std::vector<TensorView>& weights,
                        const std::optional<TensorView>& rotation, int64_t per_stream, int64_t heads,
                        int64_t kv_heads, int64_t rotate_from, double eps, const std::string& layout,
                        const std::string& tier, bool with_v) {
  constexpr int kVectors = 4;  // of a group at least: the next is loaded meanwhile
  const char* op = "qkv_norm_rope";
  const HeadArgs args{op, tensors, weights, rotation, per_stream, heads, kv_heads, -rotate_from, eps};
  HeadPlan plan = plan_qkv_norm_rope(q, k, v, args, rotate_from, layout, tier, with_v);
  const int lanes = lanes_for(plan.d), groups = kThreads / lanes;
  const int tile = plan.full_width ? 1 : int(std::max<int64_t>(1, kVectors * groups / heads));
  int64_t blocks = 0;
  for (int i = 0; i < plan.parts; ++i) {
    plan.part[i].first_block = blocks;
    blocks += (plan.batch * plan.part[i].length + tile - 1) / tile;
  }
  if (blocks == 0) return;
  check(blocks < (int64_t(1) << 31) && heads <= (1 << 20), op, ": expected fewer tokens or heads, got ", q);
  const DeviceGuard guard(q.device.index);
  dispatch_heads(op, plan, [&]<typename T, typename M>() {
    run<T, M>(op, cudaStream_t(stream), plan, unsigned(blocks), lanes, tile);
  });
}

}  // namespace rfk
