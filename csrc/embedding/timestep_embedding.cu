#include "embedding/timestep_embedding.h"

#include "core/dispatch.h"
#include "core/launch.cuh"
#include "embedding/embedding.h"

namespace rfk {

// One thread makes the sine and the cosine of one frequency of one row.
template <typename T> __global__ void timestep_embedding_kernel(T* out, TimestepEmbedding op) {
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t columns = (op.dim + 1) / 2, row = thread / columns, i = thread % columns;
  if (row >= op.rows) return;
  const int64_t half = op.dim / 2;
  out += row * op.dim;
  if (i == half) {  // the last column of an odd width
    out[2 * half] = T{};
    return;
  }
  const SinCos v = sin_cos_of_time(op.t.at(row), op.freqs[i], op.scale);
  out[i] = store<T>(op.flip ? v.cosine : v.sine);
  out[half + i] = store<T>(op.flip ? v.sine : v.cosine);
}

void timestep_embedding_cuda(Stream stream, const TensorView& out, const TensorView& t,
                             const TensorView& freqs, double scale, bool flip) {
  const TimestepEmbedding op = timestep_embedding_of(out, t, freqs, scale, flip);
  constexpr int kThreads = 256;
  const int64_t threads = op.rows * ((op.dim + 1) / 2);
  const DeviceGuard guard(out.device.index);
  dispatch_float("timestep_embedding", out.dtype, [&]<typename T>() {
    launch("timestep_embedding", timestep_embedding_kernel<T>,
           dim3(unsigned((threads + kThreads - 1) / kThreads)), dim3(kThreads), 0, cudaStream_t(stream),
           out.ptr<T>(), op);
  });
}

}  // namespace rfk
