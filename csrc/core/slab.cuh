#pragma once

#include <type_traits>

#include "core/ptx.cuh"

// Products on tensor cores from slabs of 64 bytes of a row of x, and the same inputs of the weight, in shared
// memory. Lane 4 g + t takes 16-byte piece t of rows g and g + 8 of x, by one load each, and of row g of the
// weight: two mma steps. Which of the inputs is which k is free, as long as both operands agree.

namespace rfk {

struct XFragment {
  uint32_t step[2][4];
};
struct WeightFragment {
  uint32_t step[2][2];
};

__device__ __forceinline__ uint4 load_words(const uint8_t* shared) {
  return *reinterpret_cast<const uint4*>(shared);
}

__device__ __forceinline__ XFragment x_fragment(const uint32_t (&top)[4], const uint32_t (&bottom)[4]) {
  return {{{top[0], bottom[0], top[1], bottom[1]}, {top[2], bottom[2], top[3], bottom[3]}}};
}

// Rows from `row` on of a slab of x, of 64 bytes each.
__device__ __forceinline__ XFragment load_x_slab(const uint8_t* x, int row, int lane) {
  const uint4 a = load_words(x + 64 * row + 16 * lane), b = load_words(x + 64 * (row + 8) + 16 * lane);
  const uint32_t top[4] = {a.x, a.y, a.z, a.w}, bottom[4] = {b.x, b.y, b.z, b.w};
  return x_fragment(top, bottom);
}

__device__ __forceinline__ WeightFragment load_weight_slab(const uint8_t* weight, int slot, int lane) {
  const uint4 v = load_words(weight + 64 * slot + 16 * lane);
  return {{{v.x, v.y}, {v.z, v.w}}};
}

// Where row r of the weight lies in a stage. The mma of column piece j gives lane 4 g + t columns 2 t and
// 2 t + 1; its column g is row 8 (g / 2) + 2 j + g % 2 of 32, so that the lane has rows 8 t .. 8 t + 7 over
// the four j, eight neighbours of the result. Rows lie in the order in which they are taken.
__device__ __forceinline__ int weight_slot(int r) {
  return (r & ~31) | (r >> 1 & 3) << 3 | (r >> 3 & 3) << 1 | (r & 1);
}

// `count` bytes, a multiple of the element size, and zeros up to 16
template <int ElementBytes>
__device__ __forceinline__ void copy_elements(uint8_t* shared, const uint8_t* global, int64_t count) {
  using Element = std::conditional_t<ElementBytes == 2, uint16_t, uint8_t>;
#pragma unroll 1
  for (int i = 0; i < 16; i += ElementBytes)
    *reinterpret_cast<Element*>(shared + i) =
        i < count ? *reinterpret_cast<const Element*>(global + i) : Element(0);
}

}  // namespace rfk
