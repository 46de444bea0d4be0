#include "attention/kernel.cuh"
#include "attention/kernels.h"

namespace rfk {

void attention_int8_f16(Stream stream, const AttentionArgs& args) {
  launch_attention<Coded<Values::sixteen, f16>>(stream, args);
}

}  // namespace rfk
