#pragma once

#include "linear/args.h"

// The CUDA kernels of the room, by the file that has them.

namespace rfk {

void linear_int8_mma(Stream stream, const LinearArgs& args);  // int8 x int8 or four bits
void linear_fp8_mma(Stream stream, const LinearArgs& args);   // e4m3 x e4m3
void linear_bf16_mma(Stream stream, const LinearArgs& args);  // bf16 x any storage
void linear_f16_mma(Stream stream, const LinearArgs& args);
void linear_rows(Stream stream, const LinearArgs& args);  // up to eight rows of floating x, memory bound
void linear_fma(Stream stream, const LinearArgs& args);   // all that the others do not take

}  // namespace rfk
