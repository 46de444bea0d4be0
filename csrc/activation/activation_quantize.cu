#include "activation/activation_quantize.h"

#include "activation/activation.h"
#include "core/launch.cuh"
#include "core/row_tile.cuh"

namespace rfk {
namespace {

// The ops of activation_maps.h with kind and tier known when they run: one kernel serves all.
template <typename T> struct Values {
  using A = acc_t<T>;
  Activation kind;
  bool exact;

  __device__ A rounded(A x) const { return exact ? load(store<T>(x)) : x; }
  __device__ A act(A x) const { return activate(kind, rounded(x)); }
};
template <typename T> struct Plain : Values<T> {
  static constexpr int kInputs = 1, kParams = 1, kOutputs = 1;
};
template <typename T> struct Gated : Values<T> {
  static constexpr int kInputs = 2, kParams = 2, kOutputs = 1;
};

// The parameters of the pack from column `at` on.
template <bool kVector, typename T>
__device__ void load_params(acc_t<T> (&to)[kPack], ColumnParam param, int at, int width) {
  if (!param.data) return;
  if (sizeof(T) == 2 && param.dtype == DType::f32) {
    const Pack8<float> p = load_pack<kVector>(static_cast<const float*>(param.data), at, width);
#pragma unroll
    for (int i = 0; i < kPack; ++i) to[i] += p.v[i];
  } else {
    const Pack8<T> p = load_pack<kVector>(static_cast<const T*>(param.data), at, width);
#pragma unroll
    for (int i = 0; i < kPack; ++i) to[i] += load(p.v[i]);
  }
}

// The pack of one input from column `at` on, its bias added.
template <bool kVector, typename T>
__device__ void load_input(acc_t<T> (&to)[kPack], const T* row, ColumnParam bias, int at, int width) {
  const Pack8<T> p = load_pack<kVector>(row, at, width);
#pragma unroll
  for (int i = 0; i < kPack; ++i) to[i] = load(p.v[i]);
  load_params<kVector, T>(to, bias, at, width);
}

// Block = row.
template <typename T, typename Op, int K, bool kVector>
__global__ void __launch_bounds__(kTileThreads)
    activation_quantize_kernel(RowPlan plan, Vectors<T, Op> vectors, Op op, QuantizedRows q) {
  using A = acc_t<T>;
  const RowIndex row = plan.index(blockIdx.x);
  RowTile<A, K, kVector> tile;
  tile.width = int(plan.cols);
  tile.each([&](A(&v)[kPack], int at) {
    load_input<kVector>(v, vectors.in[0].at(row), vectors.param[0], at, tile.width);
#pragma unroll
    for (int i = 0; i < kPack; ++i) v[i] = op.rounded(op.act(v[i]));
    if constexpr (Op::kInputs == 2) {
      A up[kPack];
      load_input<kVector>(up, vectors.in[1].at(row), vectors.param[1], at, tile.width);
#pragma unroll
      for (int i = 0; i < kPack; ++i) v[i] = op.rounded(v[i] * op.rounded(up[i]));
    }
  });
  quantize_tile(tile, q, q.codes.at(row), q.scales.data ? q.scales.at(row) : nullptr, 0);
}

struct QuantizeVectorsCuda {
  cudaStream_t stream;
  int device;
  const char* name;
  QuantizedRows quantized;

  template <typename T, typename Op>
  void operator()(const RowPlan& plan, const Vectors<T, Op>& vectors, Op op) const {
    constexpr int K = sizeof(T) == 8 ? 1 : 4;
    bool vector = plan.cols % kPack == 0 && quantized.codes.aligned(8);
    for (const RowVectors<const T>& in : vectors.in) vector &= in.aligned(16);
    for (const ColumnParam& param : vectors.param) vector &= uintptr_t(param.data) % 16 == 0;
    const unsigned threads = tile_threads<K, kTileThreads>(name, plan);
    const DeviceGuard guard(device);
    const auto kernel =
        vector ? activation_quantize_kernel<T, Op, K, true> : activation_quantize_kernel<T, Op, K, false>;
    launch(name, kernel, dim3(unsigned(plan.rows)), dim3(threads), 0, stream, plan, vectors, op, quantized);
  }
};

}  // namespace

void activation_quantize_call_cuda(Stream stream, const ActivationQuantizeCall& c) {
  const QuantizePlan p = plan_quantize(c);
  const QuantizeVectorsCuda backend{cudaStream_t(stream), c.x.device.index, c.op, p.quantized};
  dispatch_float(c.op, c.x.dtype, [&]<typename T>() {
    dispatch_activation(c.op, c.kind, [&](auto kind) {
      const Values<T> values{kind, sizeof(T) == 2 && c.tier == "exact"};
      with_vectors<T>(c, p, Plain<T>{values}, Gated<T>{values},
                      [&](const auto& vectors, auto op) { backend(p.plan, vectors, op); });
    });
  });
}

}  // namespace rfk
