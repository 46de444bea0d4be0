#include "attention/kernel.cuh"
#include "attention/kernels.h"

namespace rfk {

void attention_f16(Stream stream, const AttentionArgs& args) { launch_attention<Full<f16>>(stream, args); }

}  // namespace rfk
