#pragma once

#include "linear/gguf.h"

namespace rfk {

// out = the numbers of a row of blocks, rounded to D.
template <typename B, typename D> RFK_SIMD void decode_blocks(D* out, const uint8_t* row, int64_t count) {
  for (int64_t i = 0; i < count; i += B::kNumbers, row += B::kBytes)
    for (int s = 0; s < B::kNumbers / 16; ++s, out += 16) {
      const Sixteen v = B::decode(row, s);
      int8_t codes[16];
      std::memcpy(codes, v.codes, sizeof(codes));
#pragma omp simd
      for (int e = 0; e < 16; ++e) out[e] = store<D>(acc_t<D>(v.scale * float(int32_t(codes[e])) + v.offset));
    }
}

template <typename D> void decode_gguf(D* out, const void* row, Gguf kind, int64_t count) {
  with_block(kind, [&]<typename B>() { decode_blocks<B>(out, static_cast<const uint8_t*>(row), count); });
}

}  // namespace rfk
