#include <type_traits>

#include "linear/decode.cuh"
#include "linear/elements.cuh"
#include "linear/kernels.h"

// The product of up to eight rows of x, which is as fast as the weight is read: a warp computes a few
// columns, its lanes read 16 bytes of a row of the weight at a time. x lies in shared memory as float; sums
// are float, and so are scales of groups.

namespace rfk {
namespace {

constexpr int kWarps = 4, kChunk = 1024;  // inputs of x in shared memory at a time

// How 16 bytes of a weight become numbers: what they are, in order.
template <typename T> struct Elements {  // float, f16, bf16
  static constexpr int kCount = 16 / sizeof(T);
  static __device__ void decode(const uint4& words, float (&v)[kCount]) {
    const auto pack = std::bit_cast<LinearPack<T, kCount>>(words);
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = load(pack.v[i]);
  }
};
struct Int8Elements {
  static constexpr int kCount = 16;
  static __device__ void decode(const uint4& words, float (&v)[kCount]) {
    decode_int8({words.x, words.y, words.z, words.w}, v);
  }
};
struct E4m3Elements {
  static constexpr int kCount = 16;
  static __device__ void decode(const uint4& words, float (&v)[kCount]) {
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t pairs[2];
      decode_e4m3<bf16>(w[i], pairs);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        v[4 * i + e] = std::bit_cast<float>(e % 2 ? pairs[e / 2] & 0xffff0000 : pairs[e / 2] << 16);
    }
  }
};
struct Int4Elements {  // q - 8
  static constexpr int kCount = 32;
  static __device__ void decode(const uint4& words, float (&v)[kCount]) {
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
    constexpr uint8_t kAndOr = (0xf0 & 0xcc) | 0xaa;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      v[i] = std::bit_cast<float>(lop3<kAndOr>(w[i / 8] >> 4 * (i % 8), 15, 0x4b000000)) - 8388616.0f;
  }
};

struct GgufElements {
  static constexpr int kCount = 16;
  static __device__ void decode(const Sixteen& from, float (&v)[kCount]) { decode_sixteen(from, v); }
};

// Where input k of a chunk of x lies: four floats more after every 32, so that lanes whose inputs are 16 or
// 32 apart meet in no bank.
__device__ __forceinline__ int padded(int k) { return k + k / 32 * 4; }

constexpr int kStride = kChunk + kChunk / 8;  // of rows of x

// x[rows, first .. first + kChunk) into shared memory as float, zeros beyond its edges
template <int M> __device__ void load_chunk(float* shared, const LinearArgs& args, int first) {
#pragma unroll 1
  for (int i = threadIdx.x; i < M * kChunk; i += 32 * kWarps) {
    const int row = i / kChunk, k = i % kChunk;
    const bool valid = row < args.m && first + k < args.k;
    shared[row * kStride + padded(k)] =
        valid ? number_at<float>(args.x, row * args.x.stride + first + k) : 0.0f;
  }
}

// Sums of M rows and R columns. A lane takes E inputs of every 32 E; of four-bit codes they are of one group.
template <typename Kind, int M, int R> struct RowSums {
  static constexpr int E = Kind::kCount, kInputs = 32 * E;
  static constexpr bool kInt4 = E == 32, kBlocks = std::is_same_v<Kind, GgufElements>;
  using Words = std::conditional_t<kBlocks, Sixteen, uint4>;
  float sum[M][R] = {};
  Words codes[R];
  const uint8_t* from;  // of the lane, in its first row, next chunk
  int column, lane;     // column: the first
  int64_t row_bytes;

  __device__ RowSums(const LinearArgs& args, int column) : column(column), lane(int(threadIdx.x) % 32) {
    constexpr int kBytes = Kind::kCount == 4 ? 4 : Kind::kCount == 8 ? 2 : 1;
    from = static_cast<const uint8_t*>(args.weight.data) + column * args.weight.stride * kBytes;
    if (!kBlocks) from += 16 * lane;
    row_bytes = args.weight.stride * kBytes;
  }

  __device__ void fetch(const LinearArgs& args, int first) {
    if constexpr (kBlocks)
      return fetch_blocks(args, first);
    else
      fetch_words(args, first);
  }

  __device__ void fetch_blocks(const LinearArgs& args, int first) {
    with_block(args.gguf, [&]<typename B>() {
#pragma unroll
      for (int r = 0; r < R; ++r)
        if (first + lane * E < args.k && column + r < args.n)
          codes[r] = sixteen_of<B>(from + r * row_bytes, first / E + lane);
    });
  }

  __device__ void fetch_words(const LinearArgs& args, int first) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const bool valid = first + lane * E < args.k && column + r < args.n;
      codes[r] = valid ? *reinterpret_cast<const uint4*>(from + r * row_bytes) : uint4{};
    }
    from += 512;
  }

  // of the words that were fetched for inputs `first` on
  __device__ void add(const LinearArgs& args, const float* x, int first, const Words (&words)[R]) {
    const int k = first + lane * E;
    if (k >= args.k) return;
    const float* const mine = x + padded(k % kChunk);
    float part[M][R] = {}, total[M] = {};
    float w[R][E];
#pragma unroll
    for (int r = 0; r < R; ++r) Kind::decode(words[r], w[r]);
#pragma unroll
    for (int i = 0; i < E; i += 4)
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const float4 v = *reinterpret_cast<const float4*>(mine + m * kStride + i);
        if constexpr (kInt4) total[m] += (v.x + v.y) + (v.z + v.w);
#pragma unroll
        for (int r = 0; r < R; ++r)
          part[m][r] = std::fma(
              v.w, w[r][i + 3],
              std::fma(v.z, w[r][i + 2], std::fma(v.y, w[r][i + 1], std::fma(v.x, w[r][i], part[m][r]))));
      }
    if constexpr (kInt4)
      add_group(args, k, part, total);
    else
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int r = 0; r < R; ++r) sum[m][r] += part[m][r];
  }

  // sum += scale * (part of (q - 8) + (8 - zero) total) + offset total
  __device__ void add_group(const LinearArgs& args, int k, const float (&part)[M][R],
                            const float (&total)[M]) {
    const bool integer = args.weight_zero.dtype == DType::u8;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (column + r >= args.n) continue;
      const int64_t at = int64_t(column + r) * args.groups + k / args.group;
      const float scale =
          args.column_scale ? 1.0f : number_at<float>(args.weight_scale, args.scale_per_row ? at : 0);
      float shift = 0, offset = 0;
      if (args.weight_zero.data) {
        const float zero = number_at<float>(args.weight_zero, at);
        (integer ? shift : offset) = integer ? 8 - zero : zero;
      }
#pragma unroll
      for (int m = 0; m < M; ++m)
        sum[m][r] += scale * std::fma(shift, total[m], part[m][r]) + offset * total[m];
    }
  }

  __device__ void scale_columns(const LinearArgs& args) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float scale = column_scale<float>(args, column + r);
#pragma unroll
      for (int m = 0; m < M; ++m) sum[m][r] *= scale;
    }
  }

  __device__ void add_low_rank(const LinearArgs& args) {
    const float* const hidden = static_cast<const float*>(args.hidden.data);
#pragma unroll 1
    for (int i = lane; i < args.rank; i += 32) {
      float up[R];
#pragma unroll
      for (int r = 0; r < R; ++r)
        up[r] = column + r < args.n ? number_at<float>(args.up, (column + r) * args.up.stride + i) : 0.0f;
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const float h = m < args.m ? hidden[m * args.hidden.stride + i] : 0.0f;
#pragma unroll
        for (int r = 0; r < R; ++r) sum[m][r] = std::fma(h, up[r], sum[m][r]);
      }
    }
  }
};

// Blocks on a multiprocessor at a time, by registers.
template <typename Kind, int M>
inline constexpr int kBlocks = M == 1                               ? 8
                               : M > 4                              ? 3
                               : std::is_same_v<Kind, GgufElements> ? 5
                                                                    : 6;

template <typename Kind, int M, int R>
__global__ void __launch_bounds__(32 * kWarps, kBlocks<Kind, M>) linear_rows_kernel(LinearArgs args) {
  using Sums = RowSums<Kind, M, R>;
  alignas(16) __shared__ float x[M * kStride];
  Sums s(args, (int(blockIdx.x) * kWarps + int(threadIdx.x) / 32) * R);
  s.fetch(args, 0);
#pragma unroll 1
  for (int first = 0; first < args.k; first += Sums::kInputs) {
    typename Sums::Words words[R];
#pragma unroll
    for (int r = 0; r < R; ++r) words[r] = s.codes[r];
    if (first % kChunk == 0) {
      __syncthreads();  // the chunk before has been read
      load_chunk<M>(x, args, first);
      __syncthreads();
    }
    if (first + Sums::kInputs < args.k) s.fetch(args, first + Sums::kInputs);
    s.add(args, x, first, words);
  }

  s.scale_columns(args);
  s.add_low_rank(args);
  float mine = 0;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float v = s.sum[m][r];
#pragma unroll
      for (int bits = 16; bits > 0; bits /= 2) v += __shfl_xor_sync(0xffffffffu, v, bits);
      mine = s.lane == m * R + r ? v : mine;
    }
  static_assert(M * R <= 32);
  float result[1] = {mine};
  if (s.lane < M * R) finish(result, args, s.lane / R, s.column + s.lane % R);
}

template <typename Kind> void launch_rows(cudaStream_t stream, const LinearArgs& args) {
  const auto run = [&]<int M, int R>() {
    constexpr int kColumns = kWarps * R;
    launch("linear_rows", linear_rows_kernel<Kind, M, R>, dim3(unsigned((args.n + kColumns - 1) / kColumns)),
           dim3(32 * kWarps), 0, stream, args);
  };
  if (args.m == 1) return run.template operator()<1, 2>();
  if (args.m <= 4) return run.template operator()<4, 2>();
  run.template operator()<8, 2>();
}

}  // namespace

void linear_rows(Stream stream, const LinearArgs& args) {
  const auto s = cudaStream_t(stream);
  switch (args.storage) {
    case Storage::int8: return launch_rows<Int8Elements>(s, args);
    case Storage::e4m3: return launch_rows<E4m3Elements>(s, args);
    case Storage::int4: return launch_rows<Int4Elements>(s, args);
    case Storage::gguf: return launch_rows<GgufElements>(s, args);
    case Storage::floating: break;
  }
  if (args.weight.dtype == DType::bf16) return launch_rows<Elements<bf16>>(s, args);
  if (args.weight.dtype == DType::f16) return launch_rows<Elements<f16>>(s, args);
  launch_rows<Elements<float>>(s, args);
}

}  // namespace rfk
