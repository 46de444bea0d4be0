#pragma once

#include <cstdint>
#include <type_traits>

#include "core/ptx.cuh"

namespace rfk {

// Where 16-byte piece `piece` of row `row` lies in it: see row_pitch.
template <int Pitch> __device__ __forceinline__ int piece_of_row(int row, int piece) {
  return 16 * (Pitch % 128 ? piece : piece ^ row % 8);
}

// Copies rows of `bytes` bytes, `stride` bytes apart, into rows of Pitch bytes in shared memory, Rows of them
// and Width bytes of each: zeros beyond `bytes`, and in rows from `count` on, which are not read. `whole`: by
// pieces of 16 bytes, under way until cp_async_wait; else element by element.
template <int Rows, int Width, int Pitch, int Threads, typename Element = uint16_t>
__device__ __forceinline__ void copy_rows(uint8_t* to, const uint8_t* from, int64_t stride, int bytes,
                                          int count, bool whole) {
  constexpr int kPieces = Width / 16, kSize = int(sizeof(Element));
  const unsigned thread = opaque(threadIdx.x);
#pragma unroll
  for (int i = 0; i < (Rows * kPieces + Threads - 1) / Threads; ++i) {
    const unsigned at = thread + i * Threads;
    const int row = int(at / kPieces), piece = int(at % kPieces);
    if (Rows * kPieces % Threads && row >= Rows) break;
    const uint8_t* const source = from + row * stride + 16 * piece;
    uint8_t* const target = to + row * Pitch + piece_of_row<Pitch>(row, piece);
    const int left = row < count ? bytes - 16 * piece : 0;
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
