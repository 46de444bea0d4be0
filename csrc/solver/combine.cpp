#include "solver/combine.h"

#include <string_view>

#include "core/backend.h"
#include "solver/solver.h"

namespace rfk {
namespace {

using Tensors = std::vector<TensorView>;
using Optional = std::optional<TensorView>;

const GuideKind* find_guide(const char* op, std::string_view name) {
  if (name.empty()) return nullptr;
  for (const GuideKind& kind : kGuides)
    if (kind.name == name) return &kind;
  std::string known;
  for (const GuideKind& kind : kGuides) known += std::string(known.empty() ? "" : ", ") + kind.name;
  fail(op, ": guide must be one of ", known, ", got ", name);
}

void check_input(const char* op, const TensorView& x, const TensorView& t, const char* name) {
  check_dense(op, x, {&t});
  check(same_shape(t, x), op, ": ", name, " must have the shape of tensors[0] ", x, ", got ", t);
  check(is_floating(t.dtype) && acc_of(t.dtype) == acc_of(x.dtype), op, ": ", name,
        " must be f64 beside an f64 tensors[0], else f32, f16 or bf16, got ", t, " beside ", x);
}

void check_inputs(const char* op, const Tensors& tensors) {
  check(1 <= tensors.size() && tensors.size() <= kMaxInputs, op, ": expected 1..", kMaxInputs,
        " tensors, got ", tensors.size());
  check(tensors[0].ndim >= 1, op, ": expected tensors [batch, ...], got ", tensors[0]);
  check(is_floating(tensors[0].dtype), op, ": expected floating tensors, got ", tensors[0]);
  check_dense(op, tensors[0], {});
  for (size_t k = 1; k < tensors.size(); ++k) check_input(op, tensors[0], tensors[k], "every tensor");
}

// A table [outputs, columns, *rows], after an axis of steps where there is a `step`.
struct Table {
  const TensorView& view;
  bool stepped;

  int ndim() const { return stepped ? 3 : 2; }
  int64_t outputs() const { return view.shape[stepped]; }
  int64_t columns() const { return view.shape[stepped + 1]; }
  TensorView rows() const {
    const TensorView now = stepped ? view.slice(0) : view;
    return now.slice(0).slice(0);
  }
  template <typename A> CoefTable<A> read(const RowArg& arg) const {
    CoefTable<A> t{view.ptr<A>(), stepped ? view.stride[0] : 0, view.stride[stepped],
                   view.stride[stepped + 1]};
    std::copy(arg.stride, arg.stride + kRowAxes, t.row);
    return t;
  }
};

void check_table(const char* op, const Table& table, int64_t outputs, int64_t columns) {
  check(table.view.ndim >= table.ndim() && table.outputs() == outputs && table.columns() == columns, op,
        ": coefs must be [", table.stepped ? "steps, " : "", "outputs, columns, *rows] with ", outputs,
        " outputs and ", columns, " columns (tensors, guided velocity, noise), got ", table.view);
}

template <typename A> void read_tensors(CombineArgs<A>& args, const Tensors& tensors) {
  const TensorView& x = tensors[0];
  args.samples = x.shape[0], args.size = x.numel() / x.shape[0];
  args.width = x.ndim > 1 ? x.shape[x.ndim - 1] : 1;
  args.inputs = int(tensors.size()), args.state = x.dtype;
  for (size_t k = 0; k < tensors.size(); ++k) args.in[k] = {tensors[k].data, tensors[k].dtype};
  args.chunk = chunk_of(args.size), args.chunks = (args.size + args.chunk - 1) / args.chunk;
}

template <typename A>
void read_guidance(const char* op, CombineArgs<A>& args, const GuideKind* kind, const Optional& guidance,
                   bool stepped) {
  if (!kind) return check(!guidance, op, ": guidance needs a guide, got ", guidance, " alone");
  check(args.inputs > kind->velocities, op, ": guide ", kind->name, " combines ", kind->velocities,
        " tensors after the first, got ", args.inputs - 1);
  const int lead = stepped ? 1 : 0;
  const bool fits = guidance && guidance->dtype == (sizeof(A) == 8 ? DType::f64 : DType::f32) &&
                    (guidance->ndim == lead + 1 ||
                     (guidance->ndim == lead + 2 &&
                      (guidance->shape[lead + 1] == args.samples || guidance->shape[lead + 1] == 1))) &&
                    guidance->shape[lead] == kind->params;
  check(fits, op, ": guidance of ", kind->name, " must be ", sizeof(A) == 8 ? "f64[" : "f32[",
        stepped ? "steps, " : "", kind->params, "] or [..., ", args.samples, "], got ", guidance);
  args.guidance = {kind->guide, guidance->ptr<A>(), stepped ? guidance->stride[0] : 0,
                   guidance->stride[lead]};
  if (guidance->ndim == lead + 2 && guidance->shape[lead + 1] > 1)
    args.guidance.sample = guidance->stride[lead + 1];
}

void check_workspace(const char* op, const TensorView& x, const Optional& workspace) {
  const int64_t bytes = combine_workspace(x);
  check(workspace && workspace->device == x.device && workspace->is_contiguous() &&
            workspace->numel() * size_of(workspace->dtype) >= bytes,
        op, ": expected a workspace of ", bytes, " bytes, got ", workspace);
}

struct CombineCall {
  const TensorView& out;
  const Tensors &more_outs, &tensors;
  const TensorView& coefs;
  const Optional &mask, &inside, &keys, &step;
  const GuideKind* kind;
  const Optional &guidance, &workspace;
};

template <typename A> CombineArgs<A> read_call(const char* op, const CombineCall& c) {
  CombineArgs<A> args{};
  const TensorView& x = c.tensors[0];
  read_tensors(args, c.tensors);
  args.outputs = int(1 + c.more_outs.size());
  args.out[0] = c.out.data;
  for (size_t j = 0; j < c.more_outs.size(); ++j) args.out[j + 1] = c.more_outs[j].data;

  const Table coefs{c.coefs, bool(c.step)};
  const int64_t columns = args.inputs + (c.kind ? 1 : 0) + (c.keys ? 1 : 0);
  check_table(op, coefs, args.outputs, columns);
  RowArg rows[2] = {{"coefs[j, k]", coefs.rows()}};
  if (c.inside) {
    const Table inside{*c.inside, bool(c.step)};
    check_table(op, inside, args.outputs, columns);
    rows[1] = {"inside[j, k]", inside.rows()};
  }
  args.plan = plan_rows(op, x, std::span(rows, c.inside ? 2 : 1));
  args.coefs = coefs.read<A>(rows[0]);
  if (c.inside) args.inside = Table{*c.inside, bool(c.step)}.read<A>(rows[1]);
  if (c.mask) args.mask = {c.mask->data, c.mask->dtype};
  if (c.keys) args.keys = {c.keys->ptr<int64_t>(), c.keys->stride[0], c.keys->stride[1]};
  if (c.keys) args.noise = int(columns - 1);
  if (c.step) args.step = c.step->ptr<int64_t>();
  read_guidance(op, args, c.kind, c.guidance, bool(c.step));
  if (per_sample(args.guidance.guide)) {
    check_workspace(op, x, c.workspace);
    args.partials = c.workspace->ptr<double>();
  }
  return args;
}

void check_combine(const char* op, const CombineCall& c) {
  check_inputs(op, c.tensors);
  const TensorView& x = c.tensors[0];
  check(c.more_outs.size() < kMaxOutputs, op, ": expected 1..", kMaxOutputs, " results, got ",
        1 + c.more_outs.size());
  check(bool(c.mask) == bool(c.inside), op, ": mask and inside go together, got mask ", c.mask,
        " and inside ", c.inside);
  if (c.mask) check_input(op, x, *c.mask, "mask");
  if (c.keys)
    check(c.keys->dtype == DType::i64 && c.keys->has_shape({x.shape[0], 3}) && c.keys->device == x.device, op,
          ": keys must be i64[", x.shape[0], ", 3] (seed, sample, step) on the device of ", x, ", got ",
          c.keys);
  if (c.step)
    check(c.step->dtype == DType::i64 && c.step->numel() == 1 && c.step->device == x.device, op,
          ": step must be i64[] on the device of ", x, ", got ", c.step);
  Tensors outs{c.out};
  outs.insert(outs.end(), c.more_outs.begin(), c.more_outs.end());
  for (size_t j = 0; j < outs.size(); ++j) {
    check_dense(op, x, {&outs[j]});
    check(same_type(outs[j], x), op, ": every out must be like tensors[0] ", x, ", got ", outs[j]);
    for (const TensorView& t : c.tensors) check_no_partial_overlap(op, outs[j], t);
    if (c.mask) check_no_partial_overlap(op, outs[j], *c.mask);
    for (size_t i = 0; i < j; ++i) check_apart(op, outs[i], outs[j]);
  }
}

}  // namespace

int64_t combine_workspace(const TensorView& x) {
  if (x.numel() == 0) return 0;
  const int64_t size = x.numel() / x.shape[0], chunk = chunk_of(size);
  return x.shape[0] * ((size + chunk - 1) / chunk) * kMaxMoments * int64_t(sizeof(double));
}

void combine(Stream stream, const TensorView& out, const Tensors& more_outs, const Tensors& tensors,
             const TensorView& coefs, const Optional& mask, const Optional& inside, const Optional& keys,
             const Optional& step, const std::string& guide, const Optional& guidance,
             const Optional& workspace) {
  const char* op = "combine";
  const CombineCall call{out,      more_outs, tensors, coefs, mask, inside, keys, step, find_guide(op, guide),
                         guidance, workspace};
  check_combine(op, call);
  if (out.numel() == 0) return;
  const auto run = [&]<typename A>() {
    const CombineArgs<A> args = read_call<A>(op, call);
    if (out.device.type == DeviceType::cpu) return combine_cpu(args);
    if constexpr (kWithCuda) return combine_cuda(stream, out.device.index, args);
    fail_without_cuda(op);
  };
  out.dtype == DType::f64 ? run.operator()<double>() : run.operator()<float>();
}

void stochastic_step(Stream stream, const TensorView& out, const TensorView& sums, const Tensors& tensors,
                     const TensorView& coefs, const TensorView& keys, const TensorView& workspace) {
  const char* op = "stochastic_step";
  const Optional none, given_keys = keys, given = workspace;
  const CombineCall call{out, {}, tensors, coefs, none, none, given_keys, none, nullptr, none, given};
  check_combine(op, call);
  const int64_t batch = tensors[0].shape[0];
  check(sums.dtype == DType::f64 && sums.has_shape({batch, moments_of(1)}) && sums.is_contiguous() &&
            sums.device == out.device,
        op, ": sums must be f64[", batch, ", ", moments_of(1), "], got ", sums);
  check_workspace(op, out, given);
  for (const TensorView& t : tensors)
    check(t.data != out.data || out.numel() == 0, op, ": out must share no memory with the tensors");
  if (out.numel() == 0) return;
  const auto run = [&]<typename A>() {
    CombineArgs<A> args = read_call<A>(op, call);
    args.residuals = true, args.sums = sums.ptr<double>(), args.partials = workspace.ptr<double>();
    if (out.device.type == DeviceType::cpu) return stochastic_step_cpu(args);
    if constexpr (kWithCuda) return stochastic_step_cuda(stream, out.device.index, args);
    fail_without_cuda(op);
  };
  out.dtype == DType::f64 ? run.operator()<double>() : run.operator()<float>();
}

void moments(Stream stream, const TensorView& out, const Tensors& tensors, const TensorView& coefs,
             const TensorView& workspace) {
  const char* op = "moments";
  check_inputs(op, tensors);
  const TensorView& x = tensors[0];
  const int64_t count = coefs.ndim ? coefs.shape[0] : 0;
  check(1 <= count && count <= kMaxOutputs, op, ": expected coefs [1..", kMaxOutputs,
        ", tensors, *rows], got ", coefs);
  const Table table{coefs, false};
  check_table(op, table, count, int64_t(tensors.size()));
  check(out.dtype == DType::f64 && out.has_shape({x.shape[0], count + count * (count + 1) / 2}) &&
            out.is_contiguous() && out.device == x.device,
        op, ": out must be f64[", x.shape[0], ", ", count + count * (count + 1) / 2, "], got ", out);
  check_workspace(op, x, workspace);
  check_apart(op, out, workspace);
  if (x.numel() == 0) return;
  const auto run = [&]<typename A>() {
    CombineArgs<A> args{};
    read_tensors(args, tensors);
    RowArg rows[] = {{"coefs[j, k]", table.rows()}};
    args.plan = plan_rows(op, x, rows);
    args.coefs = table.read<A>(rows[0]);
    args.outputs = int(count), args.sums = out.ptr<double>(), args.partials = workspace.ptr<double>();
    if (x.device.type == DeviceType::cpu) return moments_cpu(args);
    if constexpr (kWithCuda) return moments_cuda(stream, x.device.index, args);
    fail_without_cuda(op);
  };
  x.dtype == DType::f64 ? run.operator()<double>() : run.operator()<float>();
}

}  // namespace rfk
