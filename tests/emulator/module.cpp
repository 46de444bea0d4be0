// The CUDA halves of every op, executed on the CPU: rfkernels_emulated.affine_step(out, x, ...).
// They get tensors that the checking half of the op has seen, as in the library.

#include "guidance/guidance.h"
#include "noise/noise.h"
#include "rooms.h"
#include "solver/solver.h"

PYBIND11_MODULE(rfkernels_emulated, m) {
  using namespace rfk;
  python::def(m, "affine_step", &affine_step_cuda);
  python::def(m, "cfg_step", &cfg_step_cuda);
  python::def(m, "linear_combination", &linear_combination_cuda);
  python::def(m, "philox_normal", &philox_normal_cuda);
  python::def(m, "renoise", &renoise_cuda);
  python::def(m, "taylor_step", &taylor_step_cuda);
}
