#include "norm/ada_norm_cpu.h"
#include "norm/call.h"

namespace rfk {

void ada_norm_cpu(const AdaNormCall& call) { run_ada_norm(AdaNormCpu{}, call); }

}  // namespace rfk
