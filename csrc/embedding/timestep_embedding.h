#pragma once

#include "core/dtype.h"
#include "core/math.h"
#include "core/tensor.h"

namespace rfk {

// Times of any dtype, read as float.
struct Times {
  const void* data;
  DType dtype;

  RFK_HD float at(int64_t i) const {
    switch (dtype) {
      case DType::f64: return float(static_cast<const double*>(data)[i]);
      case DType::f32: return static_cast<const float*>(data)[i];
      case DType::f16: return load(static_cast<const f16*>(data)[i]);
      case DType::bf16: return load(static_cast<const bf16*>(data)[i]);
      case DType::i64: return float(static_cast<const int64_t*>(data)[i]);
      case DType::i32: return float(static_cast<const int32_t*>(data)[i]);
      case DType::i8: return float(static_cast<const int8_t*>(data)[i]);
      case DType::u8: return float(static_cast<const uint8_t*>(data)[i]);
    }
    return 0;
  }
};

struct TimestepEmbedding {
  Times t;
  const float* freqs;
  int64_t rows, dim;
  float scale;
  bool flip;
};

// Sine and cosine of the angle of time t at frequency f.
RFK_HD SinCos sin_cos_of_time(float t, float f, float scale) { return sin_cos(scale * (t * f)); }

inline TimestepEmbedding timestep_embedding_of(const TensorView& out, const TensorView& t,
                                               const TensorView& freqs, double scale, bool flip) {
  const int64_t dim = out.shape[out.ndim - 1];
  return {{t.data, t.dtype}, freqs.ptr<float>(), t.numel(), dim, float(scale), flip};
}

}  // namespace rfk
