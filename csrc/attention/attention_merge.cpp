#include "attention/attention_merge.h"

#include "attention/attention.h"
#include "core/backend.h"
#include "core/map_rows_cpu.h"

namespace rfk {

void attention_merge(Stream stream, const TensorView& out, const TensorView& lse,
                     const std::vector<TensorView>& outs, const std::vector<TensorView>& lses) {
  const char* op = "attention_merge";
  check(1 <= outs.size() && outs.size() <= kMaxParts, op, ": expected 1..", kMaxParts, " parts, got ",
        outs.size());
  check(lses.size() == outs.size(), op, ": expected an lse for each of ", outs.size(), " parts, got ",
        lses.size());
  check(outs[0].ndim >= 1 && outs[0].shape[outs[0].ndim - 1] >= 1, op, ": outs must be [..., rows, d], got ",
        outs[0]);
  TensorView rows = outs[0];  // as a shape
  rows.ndim -= 1;
  rows.dtype = acc_of(outs[0].dtype);
  check_dense(op, outs[0], {&out, &lse});
  check(same_type(out, outs[0]), op, ": out must be like outs[0] ", outs[0], ", got ", out);
  check(same_type(lse, rows), op, ": lse must be like lses[0] ", lses[0], ", got ", lse);
  for (size_t k = 0; k < outs.size(); ++k) {
    check_dense(op, outs[0], {&outs[k], &lses[k]});
    check(same_type(outs[k], outs[0]), op, ": outs[", k, "] must be like outs[0] ", outs[0], ", got ",
          outs[k]);
    check(same_type(lses[k], rows), op, ": lses[", k, "] must be ", name_of(rows.dtype),
          ", one for each row of outs[0] ", outs[0], ", got ", lses[k]);
    check_no_partial_overlap(op, out, outs[k]);
    check_no_partial_overlap(op, lse, lses[k]);
    check_apart(op, out, lses[k]);
    check_apart(op, lse, outs[k]);
  }
  check_apart(op, out, lse);
  if (lse.numel() == 0) return;

  if (out.device.type == DeviceType::cpu) return run_attention_merge(MapRowsCpu{}, out, lse, outs, lses);
  if constexpr (kWithCuda) return attention_merge_cuda(stream, out, lse, outs, lses);
  fail_without_cuda(op);
}

}  // namespace rfk
