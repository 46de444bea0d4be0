#include "attention/kernel.cuh"
#include "attention/kernels.h"

namespace rfk {

void attention_int8(Stream stream, const AttentionArgs& args) {
  launch_attention<Coded<Values::int8>>(stream, args);
}

}  // namespace rfk
