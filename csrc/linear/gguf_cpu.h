#pragma once

#include <algorithm>
#include <type_traits>

#include "core/pack.h"
#include "linear/gguf.h"

namespace rfk {

// out = the numbers of a row of blocks. Unrolled, so that shifts are constants and a block's scale is read
// once.
template <typename B>
RFK_SIMD void decode_blocks(float* __restrict__ out, const uint8_t* __restrict__ row, int64_t count) {
  for (int64_t i = 0; i < count; i += B::kNumbers, row += B::kBytes)
#pragma GCC unroll 16
    for (int s = 0; s < B::kNumbers / 16; ++s, out += 16) {
      const Sixteen v = B::decode(row, s);
      int8_t codes[16];
      std::memcpy(codes, v.codes, sizeof(codes));
#pragma omp simd
      for (int e = 0; e < 16; ++e) out[e] = v.scale * float(int32_t(codes[e])) + v.offset;
    }
}

// The same rounded to D, by pieces that stay in the first cache: rounding is twice as fast in long loops.
template <typename D> void decode_gguf(D* out, const void* blocks, Gguf kind, int64_t count) {
  with_block(kind, [&]<typename B>() {
    const auto* row = static_cast<const uint8_t*>(blocks);
    if constexpr (std::is_same_v<D, float>) return decode_blocks<B>(out, row, count);
    constexpr int64_t kPiece = 256;
    float numbers[kPiece];
    for (int64_t i = 0; i < count; i += kPiece, row += kPiece / B::kNumbers * B::kBytes) {
      const int64_t n = std::min(kPiece, count - i);
      decode_blocks<B>(numbers, row, n);
      decode_row<D, float>(out + i, numbers, n);
    }
  });
}

}  // namespace rfk
