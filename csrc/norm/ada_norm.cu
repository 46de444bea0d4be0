#include "core/launch.cuh"
#include "core/row_tile.cuh"
#include "norm/call.h"

namespace rfk {
namespace {

// Which code a kernel has for the tiers: that of the fast one, of the exact ones, or of all.
enum class Code { fast, exact, all };

template <Code kCode> __device__ bool is_fast(Tier tier) {
  return kCode == Code::all ? tier == Tier::fast : kCode == Code::fast;
}

// values[i] = f(the numbers of a parameter row from column `at` on), if there is one.
template <bool kVector, typename M, typename A, typename F>
__device__ void with_parameters(const M* row, int at, int width, A (&values)[kPack], F f) {
  if (!row) return;
  const Pack8<M> p = load_pack<kVector>(row, at, width);
#pragma unroll
  for (int i = 0; i < kPack; ++i) values[i] = f(values[i], A(load(p.v[i])));
}

// v = (v w + b) f + s with the parameters from column `at` on, w and b already in `weight` and `bias`.
template <typename M, Code kCode, typename A>
__device__ void modulate_pack(A (&v)[kPack], Moments<A> m, const A (&weight)[kPack], const A (&bias)[kPack],
                              const A (&factor)[kPack], const A (&shift)[kPack], Tier tier) {
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    const A n = (v[i] - m.mean) * m.rstd;
    const Affine<A> k{weight[i], bias[i], factor[i], shift[i]};
    if (is_fast<kCode>(tier))
      v[i] = modulate<M, Tier::fast>(n, k.folded());
    else
      v[i] =
          tier == Tier::exact ? modulate<M, Tier::exact>(n, k) : modulate<M, Tier::exact_before_weight>(n, k);
  }
}

template <typename A> __device__ void fill_pack(A (&v)[kPack], A value) {
#pragma unroll
  for (int i = 0; i < kPack; ++i) v[i] = value;
}

// r = x + act(gate) w N(y), in `tile`, which holds y before.
template <Code kCode, typename T, typename M, int K, bool kVector>
__device__ void gated_residual_tile(const AdaNorm<T, M>& op, const Parameters<M, acc_t<T>>& p, const T* x,
                                    RowTile<acc_t<T>, K, kVector>& tile) {
  using A = acc_t<T>;
  const int width = tile.width;
  Moments<A> m;
  if (op.branch_norm == Norm::layer) m.mean = tile.sum(0) / A(width);
  if (op.branch_norm != Norm::none) m.rstd = 1 / std::sqrt(tile.squares(m.mean, 1) / A(width) + op.eps);
  const auto second = [](A, A given) { return given; };
  tile.each([&](A(&v)[kPack], int at) {
    const Pack8<T> base = load_pack<kVector>(x, at, width);
    A weight[kPack], factor[kPack], zero[kPack];
    fill_pack(weight, A(1));
    fill_pack(factor, A(1));
    fill_pack(zero, A(0));
    with_parameters<kVector>(op.branch_weight, at, width, weight, second);
    with_parameters<kVector>(p.gate, at, width, factor, second);
    if (op.tanh && p.gate)
#pragma unroll
      for (int i = 0; i < kPack; ++i) factor[i] = gate_factor<M>(factor[i], op.tier);
    modulate_pack<M, kCode>(v, m, weight, zero, factor, zero, op.tier);
#pragma unroll
    for (int i = 0; i < kPack; ++i) v[i] = rounded_to<T>(load(base.v[i]) + (v[i] + p.poison));
  });
}

// v = (N(v) w + b) (1 + scale) + shift
template <Code kCode, typename T, typename M, int K, bool kVector>
__device__ void norm_modulate_tile(const AdaNorm<T, M>& op, const Parameters<M, acc_t<T>>& p,
                                   RowTile<acc_t<T>, K, kVector>& tile) {
  using A = acc_t<T>;
  const int width = tile.width;
  Moments<A> m;
  if (op.norm == Norm::layer) m.mean = tile.sum(2) / A(width);
  if (op.norm != Norm::none) m.rstd = 1 / std::sqrt(tile.squares(m.mean, 3) / A(width) + op.eps);
  m.rstd += p.poison;
  const auto second = [](A, A given) { return given; };
  tile.each([&](A(&v)[kPack], int at) {
    A weight[kPack], bias[kPack], factor[kPack], shift[kPack];
    fill_pack(weight, A(1));
    fill_pack(bias, A(0));
    fill_pack(factor, A(1));
    fill_pack(shift, A(0));
    with_parameters<kVector>(op.weight, at, width, weight, second);
    with_parameters<kVector>(op.bias, at, width, bias, second);
    with_parameters<kVector>(p.scale, at, width, factor, [&](A, A scale) {
      return scale_factor<M>(scale, is_fast<kCode>(op.tier) ? Tier::fast : Tier::exact);
    });
    with_parameters<kVector>(p.shift, at, width, shift, second);
    modulate_pack<M, kCode>(v, m, weight, bias, factor, shift, op.tier);
  });
}

// Threads of a block: rows without alignment need more registers.
template <int K, bool kVector> inline constexpr int kThreads = K == 8 && !kVector ? 384 : 512;

// Block = row.
template <typename T, typename M, int K, bool kVector, Code kCode>
__global__ void __launch_bounds__((kThreads<K, kVector>)) ada_norm_kernel(AdaNorm<T, M> op) {
  using A = acc_t<T>;
  const RowIndex row = op.plan.index(blockIdx.x);
  const Parameters<M, A> p = op.parameters(row);
  RowTile<A, K, kVector> tile;
  tile.width = int(op.plan.cols);
  tile.load_row(op.y.data ? op.y.at(row) : op.x.at(row));
  if (op.y.data) {
    gated_residual_tile<kCode>(op, p, op.x.at(row), tile);
    tile.store_row(op.x_out.at(row));
  }
  if (!op.finishes()) return;
  norm_modulate_tile<kCode>(op, p, tile);
  if (op.out.data) return tile.store_row(op.out.at(row));
  if (!is_fast<kCode>(op.tier)) tile.template round_to<T>();
  const QuantizedRows& q = op.quantized;
  quantize_tile(tile, q, q.codes.at(row), q.scales.data ? q.scales.at(row) : nullptr, 4);
}

struct AdaNormCuda {
  cudaStream_t stream;
  int device;

  template <typename T, typename M> void operator()(const AdaNorm<T, M>& op) const {
    const bool vector = op.aligned(), narrow = op.plan.cols <= 4 * kPack * kThreads<4, true>;
    if constexpr (sizeof(T) == 8)
      return vector ? run<2, true, Code::all>(op) : run<2, false, Code::all>(op);
    else if (!vector)
      run<8, false, Code::all>(op);
    else if (!narrow)
      run<8, true, Code::all>(op);
    else
      op.tier != Tier::fast ? run<4, true, Code::exact>(op) : run<4, true, Code::fast>(op);
  }

 private:
  template <int K, bool kVector, Code kCode, typename T, typename M> void run(const AdaNorm<T, M>& op) const {
    const DeviceGuard guard(device);
    launch("ada_norm", ada_norm_kernel<T, M, K, kVector, kCode>, dim3(unsigned(op.plan.rows)),
           dim3(tile_threads<K, kThreads<K, kVector>>(op.name, op.plan)), 0, stream, op);
  }
};

}  // namespace

void ada_norm_cuda(Stream stream, const AdaNormCall& call) {
  run_ada_norm(AdaNormCuda{cudaStream_t(stream), call.x.device.index}, call);
}

}  // namespace rfk
