#include "moe/grouped.cuh"

namespace rfk {

void grouped_linear_cuda(Stream stream, const GroupedCall& call) {
  const DeviceGuard guard(call.x.device.index);
  const DType dtype = call.x.dtype;
  const GroupedArgs args = grouped_args(call);
  acc_of(dtype) == dtype ? grouped_fma(stream, dtype, args) : grouped_mma(stream, dtype, args);
}

}  // namespace rfk
