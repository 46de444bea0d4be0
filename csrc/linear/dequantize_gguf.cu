#include "core/dispatch.h"
#include "linear/call.h"
#include "linear/decode.cuh"
#include "linear/epilogue.cuh"

namespace rfk {
namespace {

// A thread makes sixteen neighbours.
template <typename T>
__global__ void dequantize_gguf_kernel(Table out, Table blocks, int64_t rows, int of_row, Gguf kind,
                                       bool pieces) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, row = at / of_row;
  if (row >= rows) return;
  const uint8_t* const from = static_cast<const uint8_t*>(blocks.data) + row * blocks.stride;
  float v[16];
  decode_sixteen(sixteen_of(kind, from, int(at % of_row)), v);
#pragma unroll
  for (int i = 0; i < 16; i += 8) {
    const float eight[8] = {v[i], v[i + 1], v[i + 2], v[i + 3], v[i + 4], v[i + 5], v[i + 6], v[i + 7]};
    store_numbers<T>(out, 16 * at + i, eight, 8, pieces);
  }
}

}  // namespace

void dequantize_gguf_cuda(Stream stream, const TensorView& out, const TensorView& blocks, Gguf kind) {
  const DeviceGuard guard(out.device.index);
  constexpr int kThreads = 256;
  const int64_t sixteens = out.numel() / 16;
  const Table to(out);
  dispatch_float("dequantize_gguf", out.dtype, [&]<typename T>() {
    launch("dequantize_gguf", dequantize_gguf_kernel<T>, dim3(unsigned((sixteens + kThreads - 1) / kThreads)),
           dim3(kThreads), 0, cudaStream_t(stream), to, Table(blocks), out.shape[0], int(out.shape[1] / 16),
           kind, to.aligned(8));
  });
}

}  // namespace rfk
