#include "core/launch.cuh"
#include "linear/kernels.h"

namespace rfk {
namespace {

// Rows of x below which a block of the tensor-core kernels would mostly multiply zeros.
constexpr int kFewRows = 8;

// Four-bit codes whose groups do not fill a slab of 32 inputs are decoded one by one.
bool has_whole_groups(const LinearArgs& a) {
  return a.storage != Storage::int4 || a.groups == 1 || a.group % 32 == 0;
}

bool fits_tensor_cores(const LinearArgs& a) {
  switch (a.x_storage) {
    case Storage::int8:
      return a.storage == Storage::int8 || (a.storage == Storage::int4 && !a.weight_zero.data &&
                                            has_whole_groups(a) && (a.column_scale || a.scale_per_row));
    case Storage::e4m3: return a.storage == Storage::e4m3;
    default:
      return is_16_bit(a.x.dtype) && has_whole_groups(a) &&
             (a.storage != Storage::floating || a.weight.dtype == a.x.dtype);
  }
}

// A few rows read the weight once, by pieces of 16 bytes.
bool fits_rows(const LinearArgs& a) {
  return a.m <= kFewRows && a.x_storage == Storage::floating && a.x.dtype != DType::f64 &&
         a.weight.dtype != DType::f64 && (a.weight_pieces || a.storage == Storage::gguf) &&
         has_whole_groups(a);
}

}  // namespace

void linear_cuda(Stream stream, const LinearCall& call) {
  const int device = call.x.device.index;
  const DeviceGuard guard(device);
  const LinearArgs args = linear_args(call, processors_of(device));
  if (fits_rows(args)) return linear_rows(stream, args);
  if (!fits_tensor_cores(args)) return linear_fma(stream, args);
  if (args.x_storage == Storage::int8) return linear_int8_mma(stream, args);
  if (args.x_storage == Storage::e4m3) return linear_fp8_mma(stream, args);
  if (args.x.dtype == DType::bf16) return linear_bf16_mma(stream, args);
  linear_f16_mma(stream, args);
}

}  // namespace rfk
