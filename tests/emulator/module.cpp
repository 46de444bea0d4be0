// The CUDA halves of every op, executed on the CPU: rfkernels_emulated.affine_step(out, x, ...), and the
// kernels of the emulator's own tests. An op gets tensors that its checking half has seen, as in the library;
// its kernels may touch these tensors and no other global memory.

#include <pybind11/stl.h>

#include <algorithm>
#include <deque>
#include <map>
#include <sstream>
#include <vector>

#include "activation/activation.h"
#include "activation/activation_quantize.h"
#include "attention/call.h"
#include "attention/tile_choice.h"
#include "block.h"
#include "core/check.h"
#include "embedding/embedding.h"
#include "guidance/guidance.h"
#include "kernels/collectives.h"
#include "kernels/faults.h"
#include "kernels/math.h"
#include "kernels/ptx.h"
#include "linear/call.h"
#include "linear/tile_choice.h"
#include "memory.h"
#include "moe/grouped_linear.h"
#include "noise/noise.h"
#include "norm/norm.h"
#include "rooms.h"
#include "rope/rope.h"
#include "solver/combine.h"
#include "solver/solver.h"

namespace {

using namespace rfk;
namespace py = pybind11;

// Allows the memory of every tensor of a call, under its place in the call.
class Tensors {
 public:
  void add(const TensorView& t) {
    std::ostringstream name;
    name << "tensor " << allowed_.size() << ", " << t;
    std::vector<emulator::Axis> axes;
    for (int d = 0; d < t.ndim; ++d)
      axes.push_back({size_t(t.shape[d]), size_t(t.stride[d]) * size_of(t.dtype)});
    allowed_.emplace_back(t.data, size_of(t.dtype), axes, name.str());
  }
  void add(const std::vector<TensorView>& list) {
    for (const TensorView& t : list) add(t);
  }
  void add(const std::optional<TensorView>& t) {
    if (t) add(*t);
  }
  template <typename T> void add(const T&) {}  // a number or a name

  std::vector<emulator::Traffic> traffic() const {
    std::vector<emulator::Traffic> list;
    for (const emulator::Allowed& a : allowed_) list.push_back(a.traffic);
    return list;
  }

 private:
  std::deque<emulator::Allowed> allowed_;
};

std::vector<emulator::Traffic> last_traffic;

// The same argument as a tensor of a CUDA device: an op that is called whole takes its CUDA half.
TensorView on_device(TensorView t) {
  t.device.type = DeviceType::cuda;
  return t;
}
std::optional<TensorView> on_device(const std::optional<TensorView>& t) {
  return t ? std::optional(on_device(*t)) : t;
}
std::vector<TensorView> on_device(std::vector<TensorView> list) {
  for (TensorView& t : list) t = on_device(t);
  return list;
}
template <typename T> const T& on_device(const T& v) { return v; }

template <typename... Args>
void def(py::module_& m, const char* name, void (*f)(Stream, const TensorView&, Args...)) {
  m.def(name,
        [f](const python::TensorArg& out, const typename python::Passed<std::decay_t<Args>>::type&... args) {
          Tensors tensors;
          tensors.add(out.view);
          (tensors.add(python::Passed<std::decay_t<Args>>::unwrap(args)), ...);
          last_traffic.clear();
          {
            py::gil_scoped_release release;
            f(nullptr, on_device(out.view), on_device(python::Passed<std::decay_t<Args>>::unwrap(args))...);
          }
          last_traffic = tensors.traffic();
        });
}

void activation_quantize(Stream stream, const TensorView& codes, const TensorView& scales,
                         const TensorView& x, const std::optional<TensorView>& bias, const std::string& kind,
                         const std::string& tier, const std::optional<TensorView>& tensor_scale,
                         int64_t rotation) {
  activation_quantize_call_cuda(
      stream, activation_quantize_call(codes, scales, x, bias, kind, tier, tensor_scale, rotation));
}

void gated_activation_quantize(Stream stream, const TensorView& codes, const TensorView& scales,
                               const TensorView& x, const std::optional<TensorView>& up,
                               const std::optional<TensorView>& bias,
                               const std::optional<TensorView>& up_bias, const std::string& kind,
                               bool gate_first, const std::string& tier,
                               const std::optional<TensorView>& tensor_scale, int64_t rotation) {
  activation_quantize_call_cuda(
      stream, gated_activation_quantize_call(codes, scales, x, up, bias, up_bias, kind, gate_first, tier,
                                             tensor_scale, rotation));
}

// The call without its checks: the kernels take more dtypes than the op.
void linear(Stream stream, const TensorView& out, const TensorView& x, const Optional& x_scale,
            const TensorView& weight, const Optional& weight_scale, const Optional& weight_zero,
            const Optional& bias, const Optional& hidden, const Optional& up, const Optional& gate,
            const Optional& residual, const Optional& out_scale, const Optional& workspace,
            const std::string& activation) {
  LinearCall call{out,    x,  weight, x_scale,  weight_scale, weight_zero, bias,
                  hidden, up, gate,   residual, out_scale,    workspace};
  call.epilogue = epilogue_of(activation);
  read_shapes(call);
  linear_cuda(stream, call);
}

void linear_gguf(Stream stream, const TensorView& out, const TensorView& x, const TensorView& blocks,
                 const Optional& weight_scale, const Optional& bias, const Optional& hidden,
                 const Optional& up, const Optional& gate, const Optional& residual,
                 const Optional& out_scale, const Optional& workspace, const std::string& activation,
                 const std::string& kind) {
  LinearCall call{out,    x,  blocks, {},       weight_scale, {},       bias,
                  hidden, up, gate,   residual, out_scale,    workspace};
  call.epilogue = epilogue_of(activation);
  read_shapes(call);
  call.storage = Storage::gguf;
  call.gguf = gguf_of("linear", kind);
  linear_cuda(stream, call);
}

void dequantize_gguf(Stream stream, const TensorView& out, const TensorView& blocks,
                     const std::string& kind) {
  dequantize_gguf_cuda(stream, out, blocks, gguf_of("dequantize_gguf", kind));
}

std::string linear_tile(int64_t m, int64_t n, int processors, bool fp8) {
  const TileChoice choice =
      fp8 ? choose_tile<HalfWideTile>(m, n, processors) : choose_tile<WideTile>(m, n, processors);
  return choice == TileChoice::wide ? "wide" : choice == TileChoice::middle ? "middle" : "narrow";
}

int64_t attention_workspace(const python::TensorArg& q, const python::TensorArg& k,
                            const std::optional<python::TensorArg>& q_starts, const std::string& precision) {
  return rfk::attention_workspace(on_device(q.view), on_device(k.view),
                                  on_device(python::Passed<Optional>::unwrap(q_starts)), precision);
}

uint64_t bytes(const std::map<size_t, uint64_t>& accesses) {
  uint64_t sum = 0;
  for (const auto& [width, count] : accesses) sum += width * count;
  return sum;
}

std::string describe(const emulator::Traffic& t) {
  std::ostringstream os;
  os << t.name << ": " << bytes(t.reads) << " bytes read, " << bytes(t.writes) << " written";
  return os.str();
}

void bind_traffic(py::module_& m) {
  py::class_<emulator::Traffic>(m, "Traffic")
      .def_readonly("name", &emulator::Traffic::name)
      .def_readonly("reads", &emulator::Traffic::reads, "{bytes of an access: number of them}")
      .def_readonly("writes", &emulator::Traffic::writes)
      .def_property_readonly("bytes_read", [](const emulator::Traffic& t) { return bytes(t.reads); })
      .def_property_readonly("bytes_written", [](const emulator::Traffic& t) { return bytes(t.writes); })
      .def("__repr__", &describe);
  m.def(
      "traffic", [] { return last_traffic; },
      "What the last call that returned has read and written, of each of its tensors in their order.");
}

void bind_solver(py::module_& m) {
  def(m, "affine_step", &affine_step_cuda);
  def(m, "combine", &combine);
  def(m, "linear_combination", &linear_combination_cuda);
  def(m, "moments", &moments);
  def(m, "stochastic_step", &stochastic_step);
  def(m, "taylor_step", &taylor_step_cuda);
}

void bind_device(py::module_& m) {
  m.def("set_seed", &emulator::set_seed, "The order in which blocks and warps run from now on.");
  m.def(
      "set_processors", [](int count) { emulator::processors = count; },
      "How many multiprocessors the device has from now on; 1 at first.");
  m.def(
      "set_e4m3", [](bool multiplies) { emulator::e4m3 = multiplies; },
      "Whether the device multiplies e4m3 from now on; it does at first.");
}

void bind_products(py::module_& m) {
  m.def("linear_tile", &linear_tile, "The tile that linear takes: wide, middle or narrow.");
  def(m, "dequantize_gguf", &::dequantize_gguf);
  def(m, "grouped_linear", &grouped_linear);
  def(m, "linear", &::linear);
  def(m, "linear_gguf", &::linear_gguf);
  def(m, "moe_combine", &moe_combine_cuda);
  def(m, "moe_route", &moe_route_cuda);
}

}  // namespace

// The CPU halves of the ops that are called whole.
void rfk::ada_norm_cpu(const AdaNormCall&) { rfk::fail("the emulator has CUDA kernels alone"); }

void rfk::grouped_linear_cpu(const GroupedCall&) { rfk::fail("the emulator has CUDA kernels alone"); }

void rfk::attention_cpu(const AttentionCall&) { rfk::fail("the emulator has CUDA kernels alone"); }

int64_t rfk::attention_workspace_cpu(const AttentionCall&) {
  rfk::fail("the emulator has CUDA kernels alone");
}

void rfk::ada_norm_backward_cpu(const AdaNormBackwardCall&) {
  rfk::fail("the emulator has CUDA kernels alone");
}

template <typename A> void rfk::combine_cpu(const CombineArgs<A>&) {
  rfk::fail("the emulator has CUDA kernels alone");
}
template <typename A> void rfk::moments_cpu(const CombineArgs<A>&) {
  rfk::fail("the emulator has CUDA kernels alone");
}
template <typename A> void rfk::stochastic_step_cpu(const CombineArgs<A>&) {
  rfk::fail("the emulator has CUDA kernels alone");
}
template void rfk::stochastic_step_cpu(const CombineArgs<float>&);
template void rfk::stochastic_step_cpu(const CombineArgs<double>&);
template void rfk::combine_cpu(const CombineArgs<float>&);
template void rfk::combine_cpu(const CombineArgs<double>&);
template void rfk::moments_cpu(const CombineArgs<float>&);
template void rfk::moments_cpu(const CombineArgs<double>&);

PYBIND11_MODULE(rfkernels_emulated, m) {
  bind_traffic(m);
  bind_device(m);
  bind_solver(m);
  bind_products(m);

  def(m, "activation", &activation_cuda);
  def(m, "activation_backward", &activation_backward_cuda);
  def(m, "activation_quantize", &::activation_quantize);
  def(m, "ada_norm_backward", &ada_norm_backward);
  def(m, "attention", &attention);
  m.def("attention_workspace", &::attention_workspace);
  def(m, "attention_merge", &attention_merge_cuda);
  def(m, "cfg_step", &cfg_step_cuda);
  def(m, "gated_activation", &gated_activation_cuda);
  def(m, "gated_activation_backward", &gated_activation_backward_cuda);
  def(m, "gated_activation_quantize", &::gated_activation_quantize);
  def(m, "gated_residual", &gated_residual);
  def(m, "gated_residual_norm_modulate", &gated_residual_norm_modulate);
  def(m, "gated_residual_norm_modulate_quantize", &gated_residual_norm_modulate_quantize);
  def(m, "norm_modulate", &norm_modulate);
  def(m, "norm_modulate_quantize", &norm_modulate_quantize);
  def(m, "philox_normal", &philox_normal_cuda);
  def(m, "qkv_norm_rope", &qkv_norm_rope_cuda);
  def(m, "qkv_norm_rope_backward", &qkv_norm_rope_backward_cuda);
  def(m, "renoise", &renoise_cuda);
  def(m, "stochastic_round", &stochastic_round_cuda);
  def(m, "timestep_embedding", &timestep_embedding_cuda);

  py::module_ test = m.def_submodule("test", "Kernels that test the emulator.");
  def(test, "activation_grad", &rfk::test::activation_grad);
  def(test, "atomic_sum", &rfk::test::atomic_sum);
  def(test, "block_sum", &rfk::test::block_sum);
  def(test, "collective", &rfk::test::collective);
  def(test, "copy", &rfk::test::copy);
  def(test, "copy_through_async", &rfk::test::copy_through_async);
  def(test, "double_vectors", &rfk::test::double_vectors);
  def(test, "index", &rfk::test::index);
  def(test, "math", &rfk::test::math);
  def(test, "produce_and_consume", &rfk::test::produce_and_consume);
  def(test, "ptx_byte_permute", &rfk::test::ptx_byte_permute);
  def(test, "ptx_cp_async", &rfk::test::ptx_cp_async);
  def(test, "ptx_exp2", &rfk::test::ptx_exp2);
  def(test, "ptx_fma_pair", &rfk::test::ptx_fma_pair);
  def(test, "ptx_ldmatrix", &rfk::test::ptx_ldmatrix);
  def(test, "ptx_lop3", &rfk::test::ptx_lop3);
  def(test, "ptx_mma_fragments", &rfk::test::ptx_mma_fragments);
  def(test, "ptx_mma_product", &rfk::test::ptx_mma_product);
  def(test, "ptx_red_add", &rfk::test::ptx_red_add);
  def(test, "ptx_round_pair", &rfk::test::ptx_round_pair);
  def(test, "ptx_stmatrix", &rfk::test::ptx_stmatrix);
  def(test, "swap_warps", &rfk::test::swap_warps);
  def(test, "use_block", &rfk::test::use_block);
  def(test, "use_shared", &rfk::test::use_shared);
}
