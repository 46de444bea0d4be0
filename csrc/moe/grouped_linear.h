#pragma once

#include "core/check.h"
#include "moe/moe.h"

namespace rfk {

// A checked call.
struct GroupedCall {
  TensorView out, x;
  std::vector<TensorView> weights, up, bias, up_bias;
  TensorView offsets;
  Optional index, workspace;

  int64_t slots() const { return out.shape[0]; }
  int64_t n() const { return weights[0].shape[0]; }
  int64_t k() const { return x.shape[1]; }
  int experts() const { return int(weights.size()); }
  bool gated() const { return !up.empty(); }
};

void grouped_linear_cpu(const GroupedCall& call);
void grouped_linear_cuda(Stream stream, const GroupedCall& call);

}  // namespace rfk
