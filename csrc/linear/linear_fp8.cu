#include "linear/kernels.h"
#include "linear/mma.cuh"

namespace rfk {

void linear_fp8_mma(Stream stream, const LinearArgs& args) {
  launch_mma<E4m3E4m3>(cudaStream_t(stream), args);
}

}  // namespace rfk
