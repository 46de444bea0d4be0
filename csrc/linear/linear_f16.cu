#include "linear/kernels.h"
#include "linear/mma.cuh"

namespace rfk {

void linear_f16_mma(Stream stream, const LinearArgs& args) {
  const auto s = cudaStream_t(stream);
  switch (args.storage) {
    case Storage::floating: return launch_mma<Floating<f16, Storage::floating>>(s, args);
    case Storage::int8: return launch_mma<Floating<f16, Storage::int8>>(s, args);
    case Storage::e4m3: return launch_mma<Floating<f16, Storage::e4m3>>(s, args);
    case Storage::int4: return launch_mma<Floating<f16, Storage::int4>>(s, args);
    case Storage::gguf: return launch_mma<Decoded<f16>>(s, args);
  }
}

}  // namespace rfk
