#include "attention/kernel.cuh"
#include "attention/kernels.h"

namespace rfk {

void attention_bf16(Stream stream, const AttentionArgs& args) { launch_attention<Full<bf16>>(stream, args); }

}  // namespace rfk
