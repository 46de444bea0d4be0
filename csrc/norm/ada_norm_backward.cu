#include "norm/ada_norm_backward.h"

#include "core/launch.cuh"
#include "core/row_tile.cuh"

namespace rfk {
namespace {

// g = act(table) w dy of the pack from column `at` on; also dy itself.
template <bool kVector, typename T, typename M>
__device__ void gradient_pack(const AdaNormBackward<T, M>& op, const M* table, const T* row, int at,
                              int width, acc_t<T> (&dy)[kPack], acc_t<T> (&g)[kPack]) {
  using A = acc_t<T>;
  const Pack8<T> p = load_pack<kVector>(row, at, width);
#pragma unroll
  for (int i = 0; i < kPack; ++i) g[i] = dy[i] = load(p.v[i]);
  if (op.weight) {
    const Pack8<M> w = load_pack<kVector>(op.weight, at, width);
#pragma unroll
    for (int i = 0; i < kPack; ++i) g[i] *= A(load(w.v[i]));
  }
  if (table) {
    const Pack8<M> t = load_pack<kVector>(table, at, width);
#pragma unroll
    for (int i = 0; i < kPack; ++i) g[i] *= op.factor(load(t.v[i]));
  }
}

// Threads of a block: float64 needs more registers.
template <typename T> inline constexpr int kThreads = sizeof(T) == 8 ? 256 : 512;

// Block = task: the rows of one part of a group, one after the other; P and Q wait in shared memory, where
// each thread has its own columns.
template <typename T, typename M, int K, bool kVector>
__global__ void __launch_bounds__(kThreads<T>) ada_norm_backward_kernel(AdaNormBackward<T, M> op) {
  using A = acc_t<T>;
  const int width = int(op.plan.cols);
  const int64_t group = blockIdx.x / op.splits, split = blockIdx.x % op.splits;
  A* const sums = op.sums_of(group, split);
  A* const shared = dynamic_shared<A>();
  RowTile<A, K, kVector> tile;
  tile.width = width;
  const int packs = (width + kPack - 1) / kPack;
  // P, then Q, of column at + i: neighbouring threads meet in neighbouring banks.
  const auto place_of = [=](int at, int i, int sum) { return (sum * kPack + i) * packs + at / kPack; };
  if (sums)
    tile.each([&](A(&)[kPack], int at) {
      for (int i = 0; i < kPack; ++i) shared[place_of(at, i, 0)] = shared[place_of(at, i, 1)] = 0;
    });

  const auto task = op.task(group, split);
  for (int64_t place = task.begin; place < task.end; ++place) {
    const RowIndex at_row = op.row(place);
    const M* const table = op.table_of(at_row);
    const T* const dy_row = op.dy.at(at_row);
    tile.load_row(op.v.at(at_row));
    Moments<A> m;
    if (op.norm == Norm::layer) m.mean = tile.sum(0) / A(width);
    if (op.norm != Norm::none) m.rstd = 1 / std::sqrt(tile.squares(m.mean, 1) / A(width) + op.eps);

    A sum_g = 0, sum_gn = 0, dy[kPack], g[kPack];
    tile.each([&](A(&v)[kPack], int at) {
      gradient_pack<kVector>(op, table, dy_row, at, width, dy, g);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        v[i] = (v[i] - m.mean) * m.rstd;
        if (!kVector && at + i >= width) continue;
        sum_g += g[i];
        sum_gn += g[i] * v[i];
        if (sums) {
          shared[place_of(at, i, 0)] += dy[i] * v[i];
          shared[place_of(at, i, 1)] += dy[i];
        }
      }
    });
    const A mean_g = op.norm == Norm::layer ? block_sum(sum_g, 2) / A(width) : A(0),
            mean_gn = op.norm == Norm::none ? A(0) : block_sum(sum_gn, 3) / A(width);
    tile.each([&](A(&v)[kPack], int at) {
      gradient_pack<kVector>(op, table, dy_row, at, width, dy, g);
#pragma unroll
      for (int i = 0; i < kPack; ++i) v[i] = m.rstd * (g[i] - mean_g - v[i] * mean_gn);
      if (op.add.data) {
        const Pack8<T> add = load_pack<kVector>(op.add.at(at_row), at, width);
#pragma unroll
        for (int i = 0; i < kPack; ++i) v[i] += load(add.v[i]);
      }
    });
    tile.store_row(op.dv.at(at_row));
  }
  if (sums)
    tile.each([&](A(&)[kPack], int at) {
      for (int i = 0; i < kPack && at + i < width; ++i) {
        sums[at + i] = shared[place_of(at, i, 0)];
        sums[width + at + i] = shared[place_of(at, i, 1)];
      }
    });
}

struct BackwardCuda {
  cudaStream_t stream;
  int device;

  template <typename T, typename M> void operator()(const AdaNormBackward<T, M>& op) const {
    if constexpr (sizeof(T) == 8)
      run<2, false>(op);  // its packs are moved value by value, which needs no spills
    else
      op.aligned() ? run<4, true>(op) : run<4, false>(op);
  }

 private:
  template <int K, bool kVector, typename T, typename M> void run(const AdaNormBackward<T, M>& op) const {
    constexpr int64_t kMostShared = 96 << 10;
    const char* name = "ada_norm_backward";
    const int64_t packs = (op.plan.cols + kPack - 1) / kPack,
                  shared = op.sums ? 2 * packs * kPack * int64_t(sizeof(acc_t<T>)) : 0;
    check(shared <= kMostShared, name, ": expected rows of at most ", kMostShared / 2 / sizeof(acc_t<T>),
          " where parameters want gradients, got ", op.plan.cols);
    const DeviceGuard guard(device);
    launch(name, ada_norm_backward_kernel<T, M, K, kVector>, dim3(unsigned(op.groups * op.splits)),
           dim3(tile_threads<K, kThreads<T>>(name, op.plan)), size_t(shared), stream, op);
  }
};

}  // namespace

void ada_norm_backward_cuda(Stream stream, const AdaNormBackwardCall& call) {
  run_ada_norm_backward(BackwardCuda{cudaStream_t(stream), call.v.device.index}, call);
}

}  // namespace rfk
