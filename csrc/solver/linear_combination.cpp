#include "solver/linear_combination.h"

#include "core/backend.h"
#include "core/map_rows_cpu.h"
#include "solver/solver.h"

namespace rfk {

void linear_combination(Stream stream, const TensorView& out, const std::vector<TensorView>& tensors,
                        const TensorView& coefs) {
  const char* op = "linear_combination";
  check(1 <= tensors.size() && tensors.size() <= kMaxTerms, op, ": expected 1..", kMaxTerms, " tensors, got ",
        tensors.size());
  check_dense(op, tensors[0], {&out});
  check(same_type(out, tensors[0]), op, ": out must be like tensors[0] ", tensors[0], ", got ", out);
  for (size_t k = 1; k < tensors.size(); ++k) {
    check_dense(op, tensors[0], {&tensors[k]});
    check(same_shape(tensors[k], tensors[0]), op, ": tensors[", k, "] must have the shape of tensors[0] ",
          tensors[0], ", got ", tensors[k]);
    check(tensors[k].dtype == tensors[1].dtype, op, ": tensors[", k, "] must have the dtype of tensors[1] ",
          tensors[1], ", got ", tensors[k]);
    check_no_partial_overlap(op, out, tensors[k]);
  }
  check_no_partial_overlap(op, out, tensors[0]);
  check(coefs.ndim >= 1 && coefs.shape[0] == int64_t(tensors.size()), op,
        ": coefs must hold one coefficient per tensor, [", tensors.size(), ", *rows], got ", coefs);
  check(coefs.device == out.device, op, ": expected coefs on the device of ", out, ", got ", coefs);
  if (out.numel() == 0) return;

  if (out.device.type == DeviceType::cpu) return run_linear_combination(MapRowsCpu{}, out, tensors, coefs);
  if constexpr (kWithCuda) return linear_combination_cuda(stream, out, tensors, coefs);
  fail_without_cuda(op);
}

}  // namespace rfk
