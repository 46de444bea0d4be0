#pragma once

#include "linear/args.h"

// The CUDA kernels of the room, by the file that has them. Where they round, beside the result:
//
//   x and weight     nowhere: codes are exact as 16-bit numbers, float or double, and so are their products.
//                    f16 and bf16 enter tensor cores as they are
//   sums             int8 beside int8 or four-bit codes with one scale a column: exact in int32. Groups
//   beside
//                    int8: exact within 64 inputs (a group of 32), these sums in float. e4m3: within 64
//                    inputs as tensor cores add, then float. All others: float, as tensor cores add; double
//                    for double
//   scales           float, of the sum of a column, a row, or the inputs of a group in a slab
//   low-rank branch  on tensor cores hidden and up are rounded to the 16-bit type of up (else of x, of the
//                    result, or bf16); nowhere in linear_rows and linear_fma
//   epilogue         float (double)

namespace rfk {

void linear_int8_mma(Stream stream, const LinearArgs& args);  // int8 x int8 or four bits
void linear_fp8_mma(Stream stream, const LinearArgs& args);   // e4m3 x e4m3
void linear_bf16_mma(Stream stream, const LinearArgs& args);  // bf16 x any storage
void linear_f16_mma(Stream stream, const LinearArgs& args);
void linear_rows(Stream stream, const LinearArgs& args);  // up to eight rows of floating x, memory bound
void linear_fma(Stream stream, const LinearArgs& args);   // all that the others do not take

}  // namespace rfk
