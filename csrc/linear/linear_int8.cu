#include "linear/kernels.h"
#include "linear/mma.cuh"

namespace rfk {

void linear_int8_mma(Stream stream, const LinearArgs& args) {
  const auto s = cudaStream_t(stream);
  if (args.storage == Storage::int8) return launch_mma<Int8Int8>(s, args);
  if (args.column_scale) return launch_mma<Int8Int4<false>>(s, args);
  launch_mma<Int8Int4<true>>(s, args);
}

}  // namespace rfk
