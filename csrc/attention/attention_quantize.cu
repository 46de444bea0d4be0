#include "attention/kinds.cuh"
#include "attention/quantize.h"
#include "attention/work.cuh"
#include "core/dispatch.h"
#include "core/launch.cuh"
#include "core/quantize.h"

namespace rfk {
namespace {

constexpr int kThreads = 256, kOfLane = kMaxHeadDim / 32;

// Tokens of a block: `count` of a sequence from `first` on, a place in its sample; 0 where there is nothing.
struct TokenTile {
  int sequence, sample, first, count;
  int length;  // of the sequence
};

__device__ TokenTile tile_of(const AttentionArgs& args, const Tiling& tiling, int64_t tile, bool of_keys) {
  TokenTile t;
  t.sequence = tiling.sequence(tile);
  t.sample = args.sample_of(t.sequence);
  const Span span = of_keys ? args.keys_of(t.sequence) : args.rows_of(t.sequence);
  const int before = int(tile - tiling.first(t.sequence)) * tiling.size;
  t.length = span.length;
  t.first = span.first + before;
  t.count = of_keys && !in_range(span, args) ? 0 : std::min(tiling.size, span.length - before);
  return t;
}

template <typename T> __device__ const T* token(const Tokens& t, int sample, int head, int i) {
  return static_cast<const T*>(t.data) + t.at(sample, head, i);
}

__device__ float sum_of_warp(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

// Sums of 512 keys, channel by channel: thread (g, c) of 4 x 64 has keys g, g + 4, ... and channels c, c +
// 64, ...
template <typename T> __global__ void __launch_bounds__(kThreads) key_sums_kernel(Quantization call) {
  const AttentionArgs& args = call.args;
  if (!starts_in_range(args)) return;
  const int64_t tile = blockIdx.x / args.kv_heads;
  const int head = int(blockIdx.x % args.kv_heads), group = int(threadIdx.x) / 64;
  const TokenTile t = tile_of(args, args.key_tiles(kSumTile), tile, true);
  if (t.count <= 0) return;
  __shared__ float parts[4][kMaxHeadDim];
#pragma unroll 1
  for (int c = int(threadIdx.x) % 64; c < args.d; c += 64) {
    float sum = 0;
#pragma unroll 4
    for (int i = group; i < t.count; i += 4) sum += load(token<T>(args.k, t.sample, head, t.first + i)[c]);
    parts[group][c] = sum;
  }
  __syncthreads();
  const int c = int(threadIdx.x), d = padded_head(args.d, 1);
  if (c < args.d)
    call.to.key_sums[int64_t(blockIdx.x) * d + c] = (parts[0][c] + parts[1][c]) + (parts[2][c] + parts[3][c]);
}

// What is subtracted from channel c of the keys of a sequence; channels that are not finite stay as they are.
__device__ float mean_of(const Quantization& call, int sequence, int length, int head, int c) {
  const AttentionArgs& args = call.args;
  float mean = 0;
  if (call.key_mean) {
    mean = call.key_mean[(int64_t(sequence) * args.kv_heads + head) * args.d + c];
  } else {
    const Tiling tiling = args.key_tiles(kSumTile);
    const int64_t first = tiling.first(sequence), d = padded_head(args.d, 1);
#pragma unroll 4
    for (int i = 0; i < (length + kSumTile - 1) / kSumTile; ++i)
      mean += call.to.key_sums[((first + i) * args.kv_heads + head) * d + c];
    mean /= float(length);
  }
  return std::fabs(mean) < INFINITY ? mean : 0.0f;
}

// One token as a warp holds it: channels lane, lane + 32, ...
struct TokenRow {
  float v[kOfLane];
  uint32_t top = 0;   // the largest magnitude, as bits
  float squares = 0;  // of the lane's channels

  // `mean` is of channels, in shared memory, or null
  template <typename T> __device__ TokenRow(const T* from, int d, const float* mean) {
    const int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int c = lane + 32 * i;
      v[i] = c < d ? load(from[c]) - (mean ? mean[c] : 0.0f) : 0.0f;
      squares = std::fma(v[i], v[i], squares);
      top = std::max(top, magnitude_bits(v[i]));
    }
    top = __reduce_max_sync(0xffffffffu, top);
  }

  __device__ float times(const float* other, int d) const {  // of the lane's channels
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int c = int(threadIdx.x) % 32 + 32 * i;
      sum = std::fma(v[i], c < d ? other[c] : 0.0f, sum);
    }
    return sum;
  }

  __device__ void store_codes(uint8_t* to, int d, float inverse) const {
#pragma unroll
    for (int i = 0; i < kOfLane; ++i)
      if (32 * i < d) to[int(threadIdx.x) % 32 + 32 * i] = inverse > 0 ? encode_int8(v[i] * inverse) : 0;
  }
};

// Sums of the tokens of a block: a row of `parts` each, added by the first warp.
template <int Sums> __device__ void store_stats(float* to, const float (&parts)[Sums][kCodeTile]) {
  __syncthreads();
  if (threadIdx.x >= 32) return;
#pragma unroll
  for (int i = 0; i < Sums; ++i) {
    const float sum = sum_of_warp(parts[i][threadIdx.x] + parts[i][threadIdx.x + 32]);
    if (threadIdx.x == 0) to[i] = sum;
  }
}

__device__ float square_of(uint32_t bits) { return std::bit_cast<float>(bits) * std::bit_cast<float>(bits); }

template <typename T> __device__ void quantize_rows(const Quantization& call, int64_t tile, int head) {
  const AttentionArgs& args = call.args;
  const TokenTile t = tile_of(args, args.row_tiles(kCodeTile), tile, false);
  if (t.count <= 0) return;
  __shared__ float mean[kMaxHeadDim], stats[kRowSums][kCodeTile];
  const int kv_head = head / args.group, source = source_of(args, t.sequence, kv_head);
  const Span keys = args.keys_of(source);
  if (!in_range(keys, args)) return;
#pragma unroll 1
  for (int c = threadIdx.x; c < args.d; c += kThreads)
    mean[c] = mean_of(call, source, keys.length, kv_head, c);
  __syncthreads();
  const int d = padded_head(args.d, 1);
#pragma unroll 1
  for (int i = int(threadIdx.x) / 32; i < kCodeTile; i += kThreads / 32) {
    float squares = 0, top_squares = 0;
    if (i < t.count) {
      const TokenRow row(token<T>(args.q, t.sample, head, t.first + i), args.d, nullptr);
      const RowScale scale = row_scale(row.top, Codes::int8);
      const int64_t at = (int64_t(t.sample) * args.heads + head) * args.rows + t.first + i;
      row.store_codes(call.to.q + at * d, d, scale.inverse);
      const float of_mean = sum_of_warp(row.times(mean, args.d));
      if (threadIdx.x % 32 == 0) {
        call.to.eight.q_scale[at] = scale.scale;
        call.to.eight.q_mean[at] = float(args.scale) * of_mean;
      }
      squares = sum_of_warp(row.squares), top_squares = square_of(row.top);
    }
    if (threadIdx.x % 32 == 0) stats[0][i] = squares, stats[1][i] = top_squares;
  }
  if (call.with_stats)
    store_stats<kRowSums>(call.to.row_stats + (tile * args.heads + head) * kRowSums, stats);
}

// What the keys of a block leave in shared memory.
struct KeyMemory {
  float mean[kMaxHeadDim];
  float stats[kKeySums][kCodeTile];
  uint8_t usable[kCodeTile];     // the token has finite numbers alone
  uint32_t top[4][kMaxHeadDim];  // of v, by 16 keys and channel
};

// Codes of k - mean. A token of k or v that is not finite has the scale NaN: whoever sees it becomes NaN.
template <typename T>
__device__ void quantize_keys(const Quantization& call, const TokenTile& t, int64_t tile, int head,
                              KeyMemory& memory) {
  const AttentionArgs& args = call.args;
  const int d = padded_head(args.d, 1), lane = int(threadIdx.x) % 32;
#pragma unroll 1
  for (int i = int(threadIdx.x) / 32; i < kCodeTile; i += kThreads / 32) {
    float squares = 0, top_squares = 0, value_squares = 0;
    RowScale scale{0, 0};
    if (i < t.count) {
      const TokenRow row(token<T>(args.k, t.sample, head, t.first + i), args.d, memory.mean);
      scale = row_scale(row.top, Codes::int8);
      const int64_t at = (int64_t(t.sample) * args.kv_heads + head) * args.keys + t.first + i;
      if (call.values != ValuesBecome::nothing) {
        const TokenRow value(token<T>(args.v, t.sample, head, t.first + i), args.d, nullptr);
        if (value.top >= 0x7f800000) scale = {0, NAN};
        value_squares = sum_of_warp(value.squares);
        if (call.values == ValuesBecome::bf16)
#pragma unroll
          for (int j = 0; j < kOfLane; ++j)
            if (32 * j < d)
              reinterpret_cast<bf16*>(call.to.v)[at * d + lane + 32 * j] = store<bf16>(value.v[j]);
      }
      row.store_codes(call.to.k + at * d, d, scale.inverse);
      squares = sum_of_warp(row.squares), top_squares = square_of(row.top);
    }
    if (lane == 0) {
      call.to.eight.k_scale[(tile * args.kv_heads + head) * kCodeTile + i] = scale.scale;
      memory.usable[i] = i < t.count && scale.finite();
      memory.stats[0][i] = squares, memory.stats[1][i] = top_squares;
      memory.stats[2][i] = value_squares, memory.stats[3][i] = 0;
    }
  }
}

// Codes of v, transposed: thread (g, c) of 4 x 64 has keys 16 g .. 16 g + 15 of channels c, c + 64, ...
template <typename T>
__device__ void quantize_values(const Quantization& call, const TokenTile& t, int64_t tile, int head,
                                KeyMemory& memory) {
  const AttentionArgs& args = call.args;
  const int d = padded_head(args.d, 1), group = int(threadIdx.x) / 64;
  const Codes format = call.values == ValuesBecome::int8 ? Codes::int8 : Codes::e4m3;
  const auto value = [&](int key, int c) {
    return c < args.d && memory.usable[key] ? load(token<T>(args.v, t.sample, head, t.first + key)[c]) : 0.0f;
  };
#pragma unroll 1
  for (int c = int(threadIdx.x) % 64; c < d; c += 64) {
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) top = std::max(top, magnitude_bits(value(16 * group + i, c)));
    memory.top[group][c] = top;
  }
  __syncthreads();
#pragma unroll 1
  for (int c = int(threadIdx.x) % 64; c < d; c += 64) {
    const uint32_t top =
        std::max(std::max(memory.top[0][c], memory.top[1][c]), std::max(memory.top[2][c], memory.top[3][c]));
    const RowScale scale = row_scale(top, format);
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int place = key_place(i);
      words[place / 4] |= uint32_t(encode(value(16 * group + i, c) * scale.inverse, format)) << place % 4 * 8;
    }
    const int64_t at = (tile * args.kv_heads + head) * d + c;
    *reinterpret_cast<uint4*>(call.to.v + at * kCodeTile + 16 * group) = {words[0], words[1], words[2],
                                                                          words[3]};
    if (group == 0) call.to.eight.v_scale[at] = scale.scale;
  }
}

// The squares of the steps of v, as many times as there are tokens: a part for each of the first warp's lanes
__device__ void add_step_squares(KeyMemory& memory, int d, int count) {
  if (threadIdx.x >= 32) return;
  float sum = 0;
#pragma unroll 1
  for (int c = threadIdx.x; c < d; c += 32)
    sum += square_of(
        std::max(std::max(memory.top[0][c], memory.top[1][c]), std::max(memory.top[2][c], memory.top[3][c])));
  memory.stats[3][threadIdx.x] = sum * float(count);
}

// A block has 64 tokens of one head: of q, or of k and v.
template <typename T>
__global__ void __launch_bounds__(kThreads, 3) quantize_kernel(Quantization call, int64_t row_blocks) {
  const AttentionArgs& args = call.args;
  if (!starts_in_range(args)) return;
  if (blockIdx.x < row_blocks)
    return quantize_rows<T>(call, blockIdx.x / args.heads, int(blockIdx.x % args.heads));
  const int64_t block = blockIdx.x - row_blocks, tile = block / args.kv_heads;
  const int head = int(block % args.kv_heads);
  const TokenTile t = tile_of(args, args.key_tiles(kCodeTile), tile, true);
  if (t.count <= 0) return;
  alignas(16) __shared__ unsigned char bytes[sizeof(KeyMemory)];
  KeyMemory& memory = *reinterpret_cast<KeyMemory*>(bytes);
#pragma unroll 1
  for (int c = threadIdx.x; c < args.d; c += kThreads)
    memory.mean[c] = mean_of(call, t.sequence, t.length, head, c);
  __syncthreads();
  quantize_keys<T>(call, t, tile, head, memory);
  __syncthreads();
  if (call.values == ValuesBecome::int8 || call.values == ValuesBecome::e4m3) {
    quantize_values<T>(call, t, tile, head, memory);
    if (call.with_stats) add_step_squares(memory, args.d, t.count);
  }
  if (call.with_stats)
    store_stats<kKeySums>(call.to.key_stats + (tile * args.kv_heads + head) * kKeySums, memory.stats);
}

// One warp for a head of a sequence.
__global__ void __launch_bounds__(32) decide_kernel(Quantization call, uint8_t* fell_back) {
  const AttentionArgs& args = call.args;
  if (!starts_in_range(args)) return;
  const int s = int(blockIdx.x / args.heads), head = int(blockIdx.x % args.heads),
            kv_head = head / args.group;
  const int source = source_of(args, s, kv_head);
  const auto mean = [&](const float* stats, const Tiling& tiling, int of, int length, int heads, int h,
                        int sums, int i) {
    float sum = 0;
#pragma unroll 1
    for (int tile = threadIdx.x; tile < (length + kCodeTile - 1) / kCodeTile; tile += 32)
      sum += stats[((tiling.first(of) + tile) * heads + h) * sums + i];
    return sum_of_warp(sum) / float(std::max(length, 1));
  };
  const Span keys = args.keys_of(source);
  const auto of_rows = [&](int i) {
    return mean(call.to.row_stats, args.row_tiles(kCodeTile), s, args.rows_of(s).length, args.heads, head,
                kRowSums, i);
  };
  const auto of_keys = [&](int i) {
    return mean(call.to.key_stats, args.key_tiles(kCodeTile), source, in_range(keys, args) ? keys.length : 0,
                args.kv_heads, kv_head, kKeySums, i);
  };
  const ErrorTerms terms{of_rows(0), of_rows(1), of_keys(0), of_keys(1), of_keys(2), of_keys(3)};
  if (threadIdx.x == 0) fell_back[blockIdx.x] = !(expected_error(terms, float(args.scale)) <= kErrorBudget);
}

template <typename T> void quantize(cudaStream_t stream, const Quantization& call) {
  const AttentionArgs& args = call.args;
  const int64_t rows = args.row_tiles(kCodeTile).count() * args.heads,
                keys = args.key_tiles(kCodeTile).count() * args.kv_heads,
                sums = args.key_tiles(kSumTile).count() * args.kv_heads;
  check(rows + keys <= INT32_MAX, "attention: ", rows + keys,
        " tiles of tokens are more than a CUDA grid has blocks");
  if (!call.key_mean && sums > 0)
    launch("attention", key_sums_kernel<T>, dim3(unsigned(sums)), dim3(kThreads), 0, stream, call);
  launch("attention", quantize_kernel<T>, dim3(unsigned(rows + keys)), dim3(kThreads), 0, stream, call, rows);
}

}  // namespace

void attention_quantize(Stream stream, const Quantization& call) {
  const auto s = cudaStream_t(stream);
  if (call.args.dtype == DType::f32) return quantize<float>(s, call);
  if (call.args.dtype == DType::bf16) return quantize<bf16>(s, call);
  quantize<f16>(s, call);
}

void attention_decide(Stream stream, const Quantization& call, uint8_t* fell_back) {
  launch("attention", decide_kernel, dim3(unsigned(int64_t(call.args.sequences) * call.args.heads)), dim3(32),
         0, cudaStream_t(stream), call, fell_back);
}

}  // namespace rfk
