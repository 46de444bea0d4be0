#pragma once

#include <cstdint>
#include <type_traits>

#include "core/ptx.cuh"

namespace rfk {

// Copies rows of `bytes` bytes, `stride` bytes apart, into rows of Pitch bytes in shared memory, Rows of them
// and Width bytes of each: zeros beyond `bytes`, and in rows from `count` on, which are not read. `whole`: by
// pieces of 16 bytes, under way until cp_async_wait; else element by element. Rows of a multiple of 128 bytes
// have pieces i and i ^ (row % 8) exchanged.
template <int Rows, int Width, int Pitch, int Threads, typename Element = uint16_t>
__device__ __forceinline__ void copy_rows(uint8_t* to, const uint8_t* from, int64_t stride, int bytes,
                                          int count, bool whole) {
  constexpr int kPieces = Width / 16, kSize = int(sizeof(Element));
  static_assert(Rows * kPieces % Threads == 0);
  const int thread = opaque(int(threadIdx.x));
#pragma unroll
  for (int i = 0; i < Rows * kPieces / Threads; ++i) {
    const int at = thread + i * Threads, row = at / kPieces, first = 16 * (at % kPieces);
    const uint8_t* const source = from + row * stride + first;
    uint8_t* const target = to + row * Pitch + (first ^ (Pitch % 128 ? 0 : row % 8 * 16));
    const int left = row < count ? bytes - first : 0;
    if (kSize == 1 || whole) {
      cp_async_zfill<16>(target, source, left > 0);
    } else {
#pragma unroll 1
      for (int e = 0; e < 16; e += kSize)
        *reinterpret_cast<Element*>(target + e) =
            e < left ? *reinterpret_cast<const Element*>(source + e) : Element(0);
    }
  }
}

}  // namespace rfk
