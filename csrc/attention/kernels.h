#pragma once

#include "attention/args.h"

// The CUDA kernels of the room, by the file that has them. Where they round, beside the result:
//
//   full     products and their sums as tensor cores have them, from 16 bits into float; fma: nowhere
//   codes    q, k - mean and v to int8 or e4m3 (quantize.h); sums of int8 are exact within a tile
//   scores   float, in base 2
//   weights  to 16 bits, after a factor; to u8 of the largest of their tile, whose sum is that of what is
//            multiplied; to e4m3 of the largest so far
//   sums     float, from tile to tile (double of double)

namespace rfk {

void attention_bf16(Stream stream, const AttentionArgs& args);  // products of bf16
void attention_f16(Stream stream, const AttentionArgs& args);
void attention_fma(Stream stream, const AttentionArgs& args);        // float and double
void attention_int8(Stream stream, const AttentionArgs& args);       // codes, weights of u8
void attention_e4m3(Stream stream, const AttentionArgs& args);       // codes, weights of e4m3: sm_89, sm_120
void attention_int8_bf16(Stream stream, const AttentionArgs& args);  // codes, weights and values of 16 bits
void attention_int8_f16(Stream stream, const AttentionArgs& args);

}  // namespace rfk
