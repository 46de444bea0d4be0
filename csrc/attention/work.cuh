#pragma once

#include <algorithm>

#include "attention/args.h"
#include "core/check.h"

// Which rows a block computes and which keys they see.

namespace rfk {

// Rows are those of a tile, in one head of one sequence.
struct Work {
  int sequence, sample, head, kv_head;
  int row, first_row, rows;  // its first row in the sequence, the same as a token of q, how many it has
  int source;                // whose sequence the keys are
  int key_sample, first_key, keys;  // the token of k that is key 0, and how many are seen
  int first_tile;                   // of its keys, among the tiles of codes
  const uint8_t* mask;              // of the blocks of keys that the rows see, or null: all
  bool valid;                       // lengths and starts are in their range
};

// Called by the whole block.
__device__ __forceinline__ bool starts_in_range(const AttentionArgs& args) {
  if (!args.packed()) return true;
  const auto wrong = [&](const int32_t* starts, int tokens) {
    bool found = starts[0] != 0 || starts[args.sequences] != tokens;
#pragma unroll 1
    for (int i = threadIdx.x; i < args.sequences; i += blockDim.x) found |= starts[i] > starts[i + 1];
    return found;
  };
  return !__syncthreads_or(wrong(args.q_starts, args.rows) || wrong(args.k_starts, args.keys));
}

__device__ __forceinline__ bool in_range(const Span& keys, const AttentionArgs& args) {
  return keys.length >= 0 && keys.length <= args.keys;
}

// The sequence whose keys and values a head of sequence s takes.
__device__ __forceinline__ int source_of(const AttentionArgs& args, int s, int kv_head) {
  return args.head_shift ? int(source_sample(s, args.frames, args.head_shift[kv_head])) : s;
}

// Blocks are numbered by tiles, heads and samples, so that neighbours read the same keys.
template <int Rows> __device__ __forceinline__ Work find_work(const AttentionArgs& args) {
  const Tiling tiling = args.row_tiles(Rows);
  const int64_t tiles = tiling.of_sample();
  Work w;
  const int tile = int(blockIdx.x % tiles);
  w.head = int(blockIdx.x / tiles % args.heads);
  w.kv_head = w.head / args.group;
  w.sample = int(blockIdx.x / tiles / args.heads);
  w.valid = starts_in_range(args);
  if (!w.valid) {  // every row has some tile all the same
    w.sequence = 0;
    w.row = w.first_row = tile * Rows, w.rows = std::min(Rows, args.rows - w.first_row);
    return w;
  }
  w.sequence = args.packed() ? tiling.sequence(tile) : w.sample;
  const Span rows = args.rows_of(w.sequence);
  w.row = int(tile - (args.packed() ? tiling.first(w.sequence) : 0)) * Rows;
  w.first_row = rows.first + w.row, w.rows = std::min(Rows, rows.length - w.row);
  w.source = source_of(args, w.sequence, w.kv_head);
  const Span keys = args.keys_of(w.source);
  w.key_sample = args.sample_of(w.source), w.first_key = keys.first, w.keys = keys.length;
  w.first_tile = int(args.key_tiles(kCodeTile).first(w.source));
  w.mask = nullptr;
  if (args.block_mask.data)
    w.mask = static_cast<const uint8_t*>(args.block_mask.data) +
             args.block_mask.at(w.sample, w.head, w.row / kBlockRows);
  w.valid = in_range(keys, args);
  return w;
}

// The first tile of Keys keys from `tile` on that the block visits, or one beyond the last; whole warps ask,
// all for the same.
template <int Keys> __device__ __forceinline__ int next_tile(const Work& w, int tile) {
  constexpr int kOfBlock = kBlockKeys / Keys;  // tiles of a block of the mask
  if (!w.mask) return tile;
  const int lane = int(threadIdx.x) % 32, count = (w.keys + Keys - 1) / Keys;
#pragma unroll 1
  for (; tile < count; tile += 32) {
    const unsigned seen = __ballot_sync(0xffffffffu, tile + lane < count && w.mask[(tile + lane) / kOfBlock]);
    if (seen) return tile + __ffs(int(seen)) - 1;
  }
  return count;
}

__device__ __forceinline__ bool is_of_another_kernel(const AttentionArgs& args, const Work& w) {
  return args.fell_back && args.fell_back[int64_t(w.sequence) * args.heads + w.head] != args.takes;
}

template <typename A> __device__ __forceinline__ A* lse_of(const AttentionArgs& args, const Work& w) {
  return static_cast<A*>(args.lse) + (int64_t(w.sample) * args.heads + w.head) * args.rows + w.first_row;
}

template <typename T>
__device__ __forceinline__ T* out_of(const AttentionArgs& args, const Work& w, int row) {
  return static_cast<T*>(args.out.data) + args.out.at(w.sample, w.head, w.first_row + row);
}

template <typename T>
__device__ __forceinline__ void fill_with_nan(const AttentionArgs& args, const Work& w) {
#pragma unroll 1
  for (int row = 0; row < w.rows; ++row) {
    if (threadIdx.x == 0) lse_of<acc_t<T>>(args, w)[row] = acc_t<T>(NAN);
#pragma unroll 1
    for (int c = threadIdx.x; c < args.d; c += blockDim.x)
      out_of<T>(args, w, row)[c] = store<T>(acc_t<T>(NAN));
  }
}

// Blocks of a kernel whose tiles have `rows` rows.
inline dim3 attention_grid(const AttentionArgs& args, int rows) {
  const int64_t blocks = args.row_tiles(rows).count() * args.heads;
  check(blocks <= INT32_MAX, "attention: ", blocks, " tiles of rows are more than a CUDA grid has blocks");
  return dim3(unsigned(blocks));
}

}  // namespace rfk
