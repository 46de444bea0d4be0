#include "attention/kernel.cuh"
#include "attention/kernels.h"

namespace rfk {

void attention_e4m3(Stream stream, const AttentionArgs& args) {
  launch_attention<Coded<Values::e4m3>>(stream, args);
}

}  // namespace rfk
