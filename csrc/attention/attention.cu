#include "attention/kernels.h"
#include "core/launch.cuh"

namespace rfk {

void attention_cuda(Stream stream, const AttentionCall& call) {
  const DeviceGuard guard(call.q.device.index);
  const AttentionArgs args = attention_args(call);
  if (call.q.dtype == DType::bf16) return attention_bf16(stream, args);
  attention_f16(stream, args);
}

int64_t attention_workspace_cuda(const AttentionCall&) { return 0; }

}  // namespace rfk
