#include "embedding/timestep_embedding.h"

#include <algorithm>

#include "core/backend.h"
#include "core/dispatch.h"
#include "embedding/embedding.h"

namespace rfk {
namespace {

// Strip by strip, since GCC makes SIMD of angles and of conversions, but not of both in one loop.
template <typename T> RFK_SIMD void embed_row(T* row, const TimestepEmbedding& op, float time) {
  constexpr int64_t kStrip = 256;
  float sine[kStrip], cosine[kStrip];
  const float* freqs = op.freqs;
  const float scale = op.scale;
  const int64_t half = op.dim / 2;
  T *sines = row + (op.flip ? half : 0), *cosines = row + (op.flip ? 0 : half);
  for (int64_t strip = 0; strip < half; strip += kStrip) {
    const int64_t count = std::min(kStrip, half - strip);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const SinCos v = sin_cos_of_time(time, freqs[strip + i], scale);
      sine[i] = v.sine, cosine[i] = v.cosine;
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) sines[strip + i] = store<T>(sine[i]);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) cosines[strip + i] = store<T>(cosine[i]);
  }
  if (op.dim % 2) row[op.dim - 1] = T{};
}

template <typename T> void embed(T* out, const TimestepEmbedding& op) {
#pragma omp parallel for schedule(static) if (op.rows * op.dim > 8192)
  for (int64_t r = 0; r < op.rows; ++r) embed_row(out + r * op.dim, op, op.t.at(r));
}

}  // namespace

void timestep_embedding(Stream stream, const TensorView& out, const TensorView& t, const TensorView& freqs,
                        double scale, bool flip) {
  const char* op = "timestep_embedding";
  check_dense(op, out, {&t, &freqs});
  const bool shape = out.ndim == t.ndim + 1 && std::equal(t.shape, t.shape + t.ndim, out.shape);
  check(shape, op, ": out must be [*t.shape, dim] for t ", t, ", got ", out);
  const int64_t half = out.shape[t.ndim] / 2;
  check(freqs.dtype == DType::f32 && freqs.ndim == 1 && freqs.has_shape({half}), op, ": freqs must be f32[",
        half, "], got ", freqs);
  check(out.dtype <= DType::bf16, op, ": dtype must be f64, f32, f16 or bf16, got ", out);
  if (out.numel() == 0) return;

  if (out.device.type == DeviceType::cpu)
    return dispatch_float(op, out.dtype, [&]<typename T>() {
      embed(out.ptr<T>(), timestep_embedding_of(out, t, freqs, scale, flip));
    });
  if constexpr (kWithCuda) return timestep_embedding_cuda(stream, out, t, freqs, scale, flip);
  fail_without_cuda(op);
}

}  // namespace rfk
