#include "attention/attention_merge.h"

#include "attention/attention.h"
#include "core/map_rows.cuh"

namespace rfk {

void attention_merge_cuda(Stream stream, const TensorView& out, const TensorView& lse,
                          const std::vector<TensorView>& outs, const std::vector<TensorView>& lses) {
  run_attention_merge(MapRowsCuda{cudaStream_t(stream), out.device.index}, out, lse, outs, lses);
}

}  // namespace rfk
