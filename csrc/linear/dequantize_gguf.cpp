#include "core/dispatch.h"
#include "linear/call.h"
#include "linear/gguf_cpu.h"

namespace rfk {

void dequantize_gguf_cpu(const TensorView& out, const TensorView& blocks, Gguf kind) {
  const int64_t rows = out.shape[0], count = out.shape[1];
  constexpr int64_t kWorth = 1 << 16;  // numbers that outweigh waking a thread
  dispatch_float("dequantize_gguf", out.dtype, [&]<typename T>() {
#pragma omp parallel for schedule(static) if (rows * count > kWorth)
    for (int64_t r = 0; r < rows; ++r)
      decode_gguf(out.ptr<T>() + r * count, blocks.ptr<uint8_t>() + r * blocks.shape[1], kind, count);
  });
}

}  // namespace rfk
