#pragma once

#include "attention/args.h"

// The CUDA kernels of the room, by the file that has them.

namespace rfk {

void attention_bf16(Stream stream, const AttentionArgs& args);  // products of bf16
void attention_f16(Stream stream, const AttentionArgs& args);

}  // namespace rfk
