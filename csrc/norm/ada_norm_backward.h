#pragma once

#include "norm/call.h"

// The gradients of y = N(v) a + t with a = w act(table), for each row:
//
//   g = a dy
//   layer: dv = rstd (g - mean(g) - n mean(g n)),  rms: dv = rstd (g - n mean(g n)),  none: dv = g,  n = N(v)
//   dv += add, where given
//
// and for each group of rows that share a row of the table the sums P = sum dy n and Q = sum dy, of which the
// gradients of table, weight and bias are made. A task is a part of the rows of one group; each has its own P
// and Q, so that the sums are the same in every run.

namespace rfk {

enum class TableAct : uint8_t { plain, one_plus, tanh };  // act(t) = t, 1 + t, tanh t

template <typename T, typename M> struct AdaNormBackward {
  using A = acc_t<T>;
  RowPlan plan;
  RowVectors<T> dv;
  RowVectors<const T> dy, v, add;
  RowVectors<const M> table;
  GroupIndex index;
  const M* weight = nullptr;
  A* sums = nullptr;                // [splits, groups, 2, cols], or null
  const int64_t* order = nullptr;   // the rows, sorted by group; null: they are sorted
  const int64_t* begins = nullptr;  // [groups + 1], where the rows of a group begin; null: each has as many
  int64_t groups = 1, splits = 1;
  Norm norm = Norm::none;
  TableAct act = TableAct::plain;
  A eps = 0;

  // Packs of eight neighbours may be moved by 16-byte accesses.
  bool aligned() const {
    return plan.cols % 8 == 0 && dv.aligned(16) && dy.aligned(16) && v.aligned(16) && add.aligned(16) &&
           table.aligned(16) && reinterpret_cast<uintptr_t>(weight) % 16 == 0;
  }

  struct Task {
    int64_t begin, end;  // places in the sorted rows
  };
  RFK_HD Task task(int64_t group, int64_t split) const {
    const int64_t first = begins ? begins[group] : group * (plan.rows / groups),
                  last = begins ? begins[group + 1] : first + plan.rows / groups, count = last - first;
    return {first + count * split / splits, first + count * (split + 1) / splits};
  }
  RFK_HD RowIndex row(int64_t place) const { return plan.index(order ? order[place] : place); }
  RFK_HD A* sums_of(int64_t group, int64_t split) const {
    return sums ? sums + (split * groups + group) * 2 * plan.cols : nullptr;
  }
  RFK_HD const M* table_of(RowIndex r) const {
    if (!table.data) return nullptr;
    if (!index.given()) return table.at(r);
    const int64_t g = index.at(r);
    return table.data + (0 <= g && g < index.groups ? g : 0) * table.stride[0];
  }
  RFK_HD A factor(A t) const {
    if (act == TableAct::plain) return t;
    return act == TableAct::one_plus ? 1 + t : std::tanh(t);
  }
};

struct AdaNormBackwardCall {
  TensorView dv, sums, dy, v;
  Optional add, weight, table, index, order, begins;
  int64_t groups, splits;
  Norm norm;
  TableAct act;
  double eps;
};

// Runs a checked call; `backend` is a back end.
template <typename Backend> void run_ada_norm_backward(const Backend& backend, const AdaNormBackwardCall& c) {
  RowArg args[] = {{"v", c.v, 1},
                   {"dv", c.dv, 1},
                   {"dy", c.dy, 1},
                   {"add", c.add.value_or(c.dy), 1},
                   {"table", c.table && !c.index ? *c.table : c.dy, 1},
                   {"index", c.index.value_or(c.dy), !c.index}};
  const RowPlan plan = plan_vectors("ada_norm_backward", c.v, args);
  const DType parameters = c.table ? c.table->dtype : c.weight ? c.weight->dtype : c.v.dtype;
  dispatch_tokens("ada_norm_backward", c.v, parameters, [&]<typename T, typename M>() {
    AdaNormBackward<T, M> op;
    op.plan = plan;
    op.v = args[0].template vectors<const T>();
    op.dv = args[1].template vectors<T>();
    op.dy = args[2].template vectors<const T>();
    if (c.add) op.add = args[3].template vectors<const T>();
    if (c.table && !c.index) op.table = args[4].template vectors<const M>();
    if (c.table && c.index) {
      op.table.data = c.table->template ptr<M>();
      op.table.stride[0] = c.table->stride[0];
      op.index = {c.index->data, {}, c.index->dtype == DType::i64, c.groups};
      std::copy(args[5].stride, args[5].stride + kRowAxes, op.index.stride);
    }
    op.weight = data_of<M>(c.weight);
    op.order = data_of<int64_t>(c.order);
    op.begins = data_of<int64_t>(c.begins);
    op.sums = c.sums.numel() ? c.sums.template ptr<acc_t<T>>() : nullptr;
    op.groups = c.groups;
    op.splits = c.splits;
    op.norm = c.norm;
    op.act = c.act;
    op.eps = acc_t<T>(c.eps);
    backend(op);
  });
}

}  // namespace rfk
