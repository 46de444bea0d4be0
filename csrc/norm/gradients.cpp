#include "core/backend.h"
#include "norm/ada_norm_backward.h"

namespace rfk {
namespace {

TableAct parse_act(const char* op, const std::string& name) {
  if (name == "plain") return TableAct::plain;
  if (name == "one_plus") return TableAct::one_plus;
  if (name == "tanh") return TableAct::tanh;
  fail(op, ": act must be 'plain', 'one_plus' or 'tanh', got '", name, "'");
}

void check_call(const char* op, const AdaNormBackwardCall& c) {
  const TensorView& v = c.v;
  check(v.ndim >= 1, op, ": expected v [*lead, width], got ", v);
  for (const TensorView* t : {&c.dv, &c.dy})
    check(same_type(*t, v), op, ": dv and dy must be like v ", v, ", got ", *t);
  check(!c.add || same_type(*c.add, v), op, ": add must be like v ", v, ", got ", c.add);
  check_no_partial_overlap(op, c.dv, v);
  check_no_partial_overlap(op, c.dv, c.dy);
  const int64_t width = v.shape[v.ndim - 1];
  check(c.sums.dtype == acc_of(v.dtype) && c.sums.is_contiguous() &&
            (c.sums.numel() == 0 || c.sums.has_shape({c.splits, c.groups, 2, width})),
        op, ": sums must be ", name_of(acc_of(v.dtype)), "[", c.splits, ", ", c.groups, ", 2, ", width,
        "] or empty, got ", c.sums);
  check(!c.weight || (c.weight->has_shape({width}) && c.weight->is_contiguous()), op, ": weight must be [",
        width, "], got ", c.weight);
  check(!c.table || (c.table->ndim >= 1 && c.table->shape[c.table->ndim - 1] == width), op,
        ": table must have a last axis of ", width, ", got ", c.table);
  check(!c.table || !c.weight || c.table->dtype == c.weight->dtype, op,
        ": expected parameters of one dtype, got ", c.weight, " and ", c.table);
  check(!c.index ||
            ((c.index->dtype == DType::i64 || c.index->dtype == DType::i32) && c.table && c.table->ndim == 2),
        op, ": index must be i64 or i32 and select from a table [groups, width], got ", c.index, " with ",
        c.table);
  const int64_t rows = width ? v.numel() / width : 0;
  check(c.groups >= 1 && c.splits >= 1 && (c.begins || rows % c.groups == 0), op,
        ": expected groups of as many rows ", "or their begins, got ", c.groups, " for ", rows, " rows");
  check(!c.order || (c.order->dtype == DType::i64 && c.order->has_shape({rows}) && c.order->is_contiguous()),
        op, ": order must be i64[", rows, "], got ", c.order);
  check(!c.begins || (c.begins->dtype == DType::i64 && c.begins->has_shape({c.groups + 1}) &&
                      c.begins->is_contiguous()),
        op, ": begins must be i64[", c.groups + 1, "], got ", c.begins);
}

}  // namespace

void ada_norm_backward(Stream stream, const TensorView& dv, const TensorView& sums, const TensorView& dy,
                       const TensorView& v, const Optional& add, const Optional& weight,
                       const Optional& table, const Optional& index, const Optional& order,
                       const Optional& begins, int64_t groups, int64_t splits, bool, const std::string& norm,
                       const std::string& act, double eps) {
  const char* op = "ada_norm_backward";
  const AdaNormBackwardCall c{dv,
                              sums,
                              dy,
                              v,
                              add,
                              weight,
                              table,
                              index,
                              order,
                              begins,
                              groups,
                              splits,
                              parse_norm(op, "norm", norm),
                              parse_act(op, act),
                              eps};
  check_call(op, c);
  if (v.numel() == 0) return;
  if (v.device.type == DeviceType::cpu) return ada_norm_backward_cpu(c);
  if constexpr (kWithCuda) return ada_norm_backward_cuda(stream, c);
  fail_without_cuda(op);
}

}  // namespace rfk
