#include "noise/noise.h"

#include "core/backend.h"
#include "noise/noise_rows_cpu.h"

namespace rfk {
namespace {

void check_keys(const char* op, const TensorView& x, const TensorView& keys) {
  check(x.ndim >= 1, op, ": expected [batch, ...], got ", x);
  check(keys.dtype == DType::i64 && keys.has_shape({x.shape[0], 3}) && keys.device == x.device, op,
        ": keys must be i64[", x.shape[0], ", 3] (seed, sample, step) on the device of ", x, ", got ", keys);
}

}  // namespace

void philox_normal(Stream stream, const TensorView& out, const TensorView& keys) {
  const char* op = "philox_normal";
  check_dense(op, out, {});
  check_keys(op, out, keys);
  if (out.numel() == 0) return;

  if (out.device.type == DeviceType::cpu) return run_philox_normal(NoiseRowsCpu{}, out, keys);
  if constexpr (kWithCuda) return philox_normal_cuda(stream, out, keys);
  fail_without_cuda(op);
}

void renoise(Stream stream, const TensorView& out, const TensorView& x, const TensorView& k,
             const TensorView& c, const TensorView& keys) {
  const char* op = "renoise";
  check_dense(op, x, {&out});
  check(same_type(out, x), op, ": out must be like x ", x, ", got ", out);
  check_keys(op, x, keys);
  check_no_partial_overlap(op, out, x);
  if (x.numel() == 0) return;

  if (x.device.type == DeviceType::cpu) return run_renoise(NoiseRowsCpu{}, out, x, k, c, keys);
  if constexpr (kWithCuda) return renoise_cuda(stream, out, x, k, c, keys);
  fail_without_cuda(op);
}

}  // namespace rfk
