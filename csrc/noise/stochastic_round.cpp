#include "noise/stochastic_round.h"

#include <string>
#include <type_traits>

#include "core/backend.h"
#include "noise/noise.h"
#include "noise/noise_rows_cpu.h"

namespace rfk {
namespace {

template <typename Code> constexpr DType dtype_of() {
  if (std::is_same_v<Code, bf16>) return DType::bf16;
  if (std::is_same_v<Code, f16>) return DType::f16;
  return std::is_same_v<Code, int8_t> ? DType::i8 : DType::u8;
}

}  // namespace

void stochastic_round(Stream stream, const TensorView& out, const TensorView& x,
                      const std::optional<TensorView>& scale, int64_t seed, const std::string& grid) {
  const char* op = "stochastic_round";
  check_dense(op, x, {&out});
  check(x.dtype == DType::f32, op, ": x must be f32, got ", x);
  check(seed >= 0, op, ": seed must be in 0 .. 2**63 - 1, got ", seed);
  dispatch_grid(op, grid, [&]<typename Grid>() {
    constexpr DType dtype = dtype_of<typename Grid::Code>();
    check(out.dtype == dtype && same_shape(out, x), op, ": out must be ", name_of(dtype),
          " in the shape of x ", x, ", got ", out);
  });
  check_apart(op, out, x);
  if (x.numel() == 0) return;

  if (x.device.type == DeviceType::cpu)
    return run_stochastic_round(NoiseRowsCpu{}, out, x, scale, seed, grid);
  if constexpr (kWithCuda) return stochastic_round_cuda(stream, out, x, scale, seed, grid);
  fail_without_cuda(op);
}

}  // namespace rfk
