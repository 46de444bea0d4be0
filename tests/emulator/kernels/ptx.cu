#include "ptx.h"

#include <type_traits>
#include <utility>

#include "core/launch.cuh"
#include "core/ptx.cuh"

namespace rfk::test {
namespace {

enum class Format { f16, bf16, s8, u8s8, e4m3 };

template <Format F> inline constexpr bool kIntegers = F == Format::s8 || F == Format::u8s8;
template <Format F> using Acc = std::conditional_t<kIntegers<F>, int32_t, float>;
template <Format F> using Stored = std::conditional_t<kIntegers<F>, int64_t, float>;  // in tensors

template <Format F>
__device__ void mma(Acc<F> (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Acc<F> (&c)[4]) {
  if constexpr (F == Format::f16) mma_f16(d, a, b, c);
  if constexpr (F == Format::bf16) mma_bf16(d, a, b, c);
  if constexpr (F == Format::s8) mma_s8(d, a, b, c);
  if constexpr (F == Format::u8s8) mma_u8s8(d, a, b, c);
  if constexpr (F == Format::e4m3) mma_e4m3(d, a, b, c);
}

// Calls f.operator()<F>() with the format of that name.
template <typename Function> void dispatch_format(const std::string& name, Function&& f) {
  if (name == "f16") return f.template operator()<Format::f16>();
  if (name == "bf16") return f.template operator()<Format::bf16>();
  if (name == "s8") return f.template operator()<Format::s8>();
  if (name == "u8s8") return f.template operator()<Format::u8s8>();
  if (name == "e4m3") return f.template operator()<Format::e4m3>();
  fail("expected f16, bf16, s8, u8s8 or e4m3, got ", name);
}

// One warp per block, one product per warp.
template <Format F>
__global__ void mma_fragments_kernel(Stored<F>* d, const int64_t* a, const int64_t* b, const Stored<F>* c) {
  const int64_t lane = int64_t(blockIdx.x) * 32 + threadIdx.x;
  uint32_t fa[4], fb[2];
  Acc<F> fc[4], fd[4];
  for (int i = 0; i < 4; ++i) fa[i] = uint32_t(a[4 * lane + i]), fc[i] = Acc<F>(c[4 * lane + i]);
  for (int i = 0; i < 2; ++i) fb[i] = uint32_t(b[2 * lane + i]);
  mma<F>(fd, fa, fb, fc);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = fd[i];
}

// One warp. A row of a or b is 32 bytes, two rows of an 8x8 matrix of ldmatrix.
template <Format F> __global__ void mma_product_kernel(Stored<F>* d, const uint8_t* a, const uint8_t* b) {
  alignas(16) __shared__ uint8_t shared_a[16 * 32], shared_b[8 * 32];
  const int lane = threadIdx.x;
  cp_async<16>(shared_a + 16 * lane, a + 16 * lane);
  cp_async<8>(shared_b + 8 * lane, b + 8 * lane);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();

  uint32_t fa[4], fb[2];
  ldmatrix_x4(fa, shared_a + 32 * (lane % 16) + 16 * (lane / 16));
  ldmatrix_x2(fb, shared_b + 32 * (lane % 8) + 16 * (lane / 8 % 2));
  Acc<F> sum[4] = {};
  mma<F>(sum, fa, fb, sum);
  for (int i = 0; i < 4; ++i) d[8 * (lane / 4 + 8 * (i / 2)) + 2 * (lane % 4) + i % 2] = sum[i];
}

// One warp; each lane fills one row of shared memory.
template <int Matrices, bool Trans>
__global__ void ldmatrix_kernel(int64_t* r, const uint8_t* memory, const int64_t* order) {
  alignas(16) __shared__ uint8_t rows[32][16];
  const int lane = threadIdx.x;
  for (int i = 0; i < 16; ++i) rows[lane][i] = memory[16 * lane + i];
  __syncwarp();
  uint32_t f[Matrices];
  const uint8_t* row = rows[order[lane]];
  if constexpr (Matrices == 1) Trans ? ldmatrix_x1_trans(f, row) : ldmatrix_x1(f, row);
  if constexpr (Matrices == 2) Trans ? ldmatrix_x2_trans(f, row) : ldmatrix_x2(f, row);
  if constexpr (Matrices == 4) Trans ? ldmatrix_x4_trans(f, row) : ldmatrix_x4(f, row);
  for (int i = 0; i < Matrices; ++i) r[Matrices * lane + i] = f[i];
}

// One warp; each lane empties one row of shared memory.
__global__ void stmatrix_kernel(uint8_t* memory, const int64_t* r, const int64_t* order) {
  alignas(16) __shared__ uint8_t rows[32][16];
  const int lane = threadIdx.x;
  uint32_t f[4];
  for (int i = 0; i < 4; ++i) f[i] = uint32_t(r[4 * lane + i]);
  stmatrix_x4(rows[order[lane]], f);
  __syncwarp();
  for (int i = 0; i < 16; ++i) memory[16 * lane + i] = rows[lane][i];
}

// One warp; each lane copies piece `lane` in the first group and piece 32 + lane in the second, and reads
// the first while the second may be under way.
template <int Bytes> __global__ void cp_async_kernel(uint8_t* out, const uint8_t* in, int64_t valid) {
  alignas(16) __shared__ uint8_t pieces[64 * Bytes];
  const int first = threadIdx.x, second = 32 + first;
  cp_async_zfill<Bytes>(pieces + Bytes * first, in + Bytes * first, first < valid);
  cp_async_commit();
  cp_async_zfill<Bytes>(pieces + Bytes * second, in + Bytes * second, second < valid);
  cp_async_commit();
  cp_async_wait<1>();
  for (int i = 0; i < Bytes; ++i) out[Bytes * first + i] = pieces[Bytes * first + i];
  cp_async_wait<0>();
  for (int i = 0; i < Bytes; ++i) out[Bytes * second + i] = pieces[Bytes * second + i];
}

// One thread per element, or per pair of 16-bit elements.
template <typename T> __global__ void red_add_kernel(T* sum, const T* x, int64_t n, int64_t m, DType dtype) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= m) return;
  if constexpr (std::is_same_v<T, float>)
    red_add(sum + i % n, x[i]);
  else if (dtype == DType::f16)
    red_add_f16x2(sum + i % n, x[i]);
  else
    red_add_bf16x2(sum + i % n, x[i]);
}

// The others: one thread per element.
__global__ void exp2_kernel(float* y, const float* x, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) y[i] = exp2_approx(x[i]);
}

__global__ void byte_permute_kernel(int64_t* d, const int64_t* a, const int64_t* b, const int64_t* selector,
                                    int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) d[i] = byte_permute(uint32_t(a[i]), uint32_t(b[i]), uint32_t(selector[i]));
}

__global__ void fma_pair_kernel(int64_t* d, const int64_t* a, const int64_t* b, const int64_t* c, int64_t n,
                                bool is_bf16) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const uint32_t x = uint32_t(a[i]), y = uint32_t(b[i]), z = uint32_t(c[i]);
  d[i] = is_bf16 ? fma_bf16x2(x, y, z) : fma_f16x2(x, y, z);
}

template <Format F> __global__ void round_pair_kernel(int64_t* d, const float* x, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float low = x[2 * i], high = x[2 * i + 1];
  d[i] = F == Format::f16    ? round_to_f16x2(low, high)
         : F == Format::bf16 ? round_to_bf16x2(low, high)
                             : round_to_e4m3x2(low, high);
}

template <int... Table>
__device__ void every_lop3(int64_t* d, int64_t n, uint32_t a, uint32_t b, uint32_t c,
                           std::integer_sequence<int, Table...>) {
  ((d[Table * n] = lop3<Table>(a, b, c)), ...);
}

__global__ void lop3_kernel(int64_t* d, const int64_t* a, const int64_t* b, const int64_t* c, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  every_lop3(d + i, n, uint32_t(a[i]), uint32_t(b[i]), uint32_t(c[i]),
             std::make_integer_sequence<int, 256>());
}

dim3 blocks_of_32(int64_t threads) { return dim3(unsigned((threads + 31) / 32)); }

}  // namespace

void ptx_mma_fragments(Stream stream, const TensorView& d, const TensorView& a, const TensorView& b,
                       const TensorView& c, const std::string& format) {
  dispatch_format(format, [&]<Format F>() {
    launch("ptx_mma_fragments", mma_fragments_kernel<F>, dim3(unsigned(d.shape[0])), dim3(32), 0,
           cudaStream_t(stream), d.ptr<Stored<F>>(), a.ptr<int64_t>(), b.ptr<int64_t>(), c.ptr<Stored<F>>());
  });
}

void ptx_mma_product(Stream stream, const TensorView& d, const TensorView& a, const TensorView& b,
                     const std::string& format) {
  dispatch_format(format, [&]<Format F>() {
    launch("ptx_mma_product", mma_product_kernel<F>, dim3(1), dim3(32), 0, cudaStream_t(stream),
           d.ptr<Stored<F>>(), a.ptr<uint8_t>(), b.ptr<uint8_t>());
  });
}

void ptx_ldmatrix(Stream stream, const TensorView& r, const TensorView& memory, const TensorView& order,
                  bool trans) {
  const auto run = [&]<int Matrices>() {
    launch("ptx_ldmatrix", trans ? ldmatrix_kernel<Matrices, true> : ldmatrix_kernel<Matrices, false>,
           dim3(1), dim3(32), 0, cudaStream_t(stream), r.ptr<int64_t>(), memory.ptr<uint8_t>(),
           order.ptr<int64_t>());
  };
  if (r.shape[1] == 1) return run.template operator()<1>();
  if (r.shape[1] == 2) return run.template operator()<2>();
  return run.template operator()<4>();
}

void ptx_stmatrix(Stream stream, const TensorView& memory, const TensorView& r, const TensorView& order) {
  launch("ptx_stmatrix", stmatrix_kernel, dim3(1), dim3(32), 0, cudaStream_t(stream), memory.ptr<uint8_t>(),
         r.ptr<int64_t>(), order.ptr<int64_t>());
}

void ptx_cp_async(Stream stream, const TensorView& out, const TensorView& in, int64_t bytes, int64_t valid) {
  const auto kernel = bytes == 4 ? cp_async_kernel<4> : bytes == 8 ? cp_async_kernel<8> : cp_async_kernel<16>;
  launch("ptx_cp_async", kernel, dim3(1), dim3(32), 0, cudaStream_t(stream), out.ptr<uint8_t>(),
         in.ptr<uint8_t>(), valid);
}

void ptx_red_add(Stream stream, const TensorView& sum, const TensorView& x) {
  const auto run = [&]<typename T>(int64_t n, int64_t m) {
    launch("ptx_red_add", red_add_kernel<T>, blocks_of_32(m), dim3(32), 0, cudaStream_t(stream), sum.ptr<T>(),
           x.ptr<T>(), n, m, sum.dtype);
  };
  if (sum.dtype == DType::f32) return run.template operator()<float>(sum.numel(), x.numel());
  return run.template operator()<uint32_t>(sum.numel() / 2, x.numel() / 2);
}

void ptx_exp2(Stream stream, const TensorView& y, const TensorView& x) {
  launch("ptx_exp2", exp2_kernel, blocks_of_32(x.numel()), dim3(32), 0, cudaStream_t(stream), y.ptr<float>(),
         x.ptr<float>(), x.numel());
}

void ptx_byte_permute(Stream stream, const TensorView& d, const TensorView& a, const TensorView& b,
                      const TensorView& selector) {
  launch("ptx_byte_permute", byte_permute_kernel, blocks_of_32(d.numel()), dim3(32), 0, cudaStream_t(stream),
         d.ptr<int64_t>(), a.ptr<int64_t>(), b.ptr<int64_t>(), selector.ptr<int64_t>(), d.numel());
}

void ptx_fma_pair(Stream stream, const TensorView& d, const TensorView& a, const TensorView& b,
                  const TensorView& c, bool is_bf16) {
  launch("ptx_fma_pair", fma_pair_kernel, blocks_of_32(d.numel()), dim3(32), 0, cudaStream_t(stream),
         d.ptr<int64_t>(), a.ptr<int64_t>(), b.ptr<int64_t>(), c.ptr<int64_t>(), d.numel(), is_bf16);
}

void ptx_round_pair(Stream stream, const TensorView& d, const TensorView& x, const std::string& format) {
  dispatch_format(format, [&]<Format F>() {
    launch("ptx_round_pair", round_pair_kernel<F>, blocks_of_32(d.numel()), dim3(32), 0, cudaStream_t(stream),
           d.ptr<int64_t>(), x.ptr<float>(), d.numel());
  });
}

void ptx_lop3(Stream stream, const TensorView& d, const TensorView& a, const TensorView& b,
              const TensorView& c) {
  launch("ptx_lop3", lop3_kernel, blocks_of_32(a.numel()), dim3(32), 0, cudaStream_t(stream),
         d.ptr<int64_t>(), a.ptr<int64_t>(), b.ptr<int64_t>(), c.ptr<int64_t>(), a.numel());
}

}  // namespace rfk::test
