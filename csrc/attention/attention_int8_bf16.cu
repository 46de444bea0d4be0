#include "attention/kernel.cuh"
#include "attention/kernels.h"

namespace rfk {

void attention_int8_bf16(Stream stream, const AttentionArgs& args) {
  launch_attention<Coded<Values::sixteen, bf16>>(stream, args);
}

}  // namespace rfk
