#include "linear/linear.h"

#include "core/backend.h"
#include "linear/call.h"

namespace rfk {
namespace {

constexpr const char* kOp = "linear";

// Rows of neighbours, `rows` by `columns`, on the device of x.
bool is_matrix(const TensorView& t, const LinearCall& c, int64_t rows, int64_t columns) {
  return t.ndim == 2 && t.shape[0] == rows && t.shape[1] == columns && t.device == c.x.device &&
         (columns <= 1 || t.stride[1] == 1);
}

bool is_vector(const TensorView& t, const LinearCall& c, int64_t length) {
  return t.ndim == 1 && t.shape[0] == length && t.device == c.x.device && t.is_contiguous();
}

void check_weight(const LinearCall& c) {
  const TensorView &x = c.x, &w = c.weight;
  check(x.ndim == 2 && is_matrix(x, c, c.m, c.k) && x.dtype != DType::i32 && x.dtype != DType::i64, kOp,
        ": x must be [rows, in] with neighbours along the last axis adjacent, floating, int8 or "
        "float8_e4m3fn, got ",
        x);
  const bool four = c.storage == Storage::int4;
  check(w.ndim == 2 && is_matrix(w, c, c.n, four ? c.k / 2 : c.k) && w.is_contiguous(), kOp,
        ": weight must be contiguous [out, ", c.k, "], or uint8 [out, ", c.k / 2,
        "] of four-bit codes, for x ", x, ", got ", w);
  const bool fits = is_floating(x.dtype)   ? c.storage != Storage::floating || w.dtype == x.dtype
                    : x.dtype == DType::i8 ? c.storage == Storage::int8 || c.storage == Storage::int4
                                           : c.storage == Storage::e4m3;
  check(fits, kOp,
        ": expected a weight of the dtype of x or of codes; int8 x with int8 or four-bit weights, "
        "float8_e4m3fn x with float8_e4m3fn weights; got x ",
        x, " and weight ", w);
}

// Integer sums and their offset stay below 2^31.
constexpr int64_t kMostInputs = 1 << 16;

// Of GGUF: whole blocks of k numbers in n rows.
void check_blocks(const char* op, const TensorView& blocks, Gguf kind, int64_t k) {
  with_block(kind, [&]<typename B>() {
    check(k % B::kNumbers == 0 && blocks.dtype == DType::u8 && blocks.ndim == 2 && blocks.is_contiguous() &&
              blocks.shape[1] == k / B::kNumbers * B::kBytes,
          op, ": blocks must be contiguous u8[out, ", k / B::kNumbers * B::kBytes, "], ", B::kBytes,
          " bytes for every ", B::kNumbers, " of ", k, " inputs, got ", blocks);
    check(reinterpret_cast<uintptr_t>(blocks.data) % B::kAlign == 0, op,
          ": blocks must begin at a multiple of ", B::kAlign, " bytes, got ", blocks, " at ", blocks.data);
  });
}

void check_scales(const LinearCall& c) {
  const DType wide = acc_of(c.x.dtype);
  check(!c.x_scale == is_floating(c.x.dtype), kOp,
        ": x_scale must be given for codes and only for them, got x ", c.x, " and x_scale ", c.x_scale);
  check(!c.x_scale || (c.x_scale->dtype == DType::f32 && is_vector(*c.x_scale, c, c.m)), kOp,
        ": x_scale must be contiguous f32[", c.m, "], one per row of x, got ", c.x_scale);
  check(c.x.dtype != DType::i8 || c.k <= kMostInputs, kOp, ": int8 x must have at most ", kMostInputs,
        " inputs, got ", c.x);
  const bool needs = c.storage == Storage::int8 || c.storage == Storage::int4;
  check(c.weight_scale || !needs, kOp, ": weight_scale must be given for a weight ", c.weight);
  if (c.weight_scale) {
    const TensorView& s = *c.weight_scale;
    const bool grouped = c.storage == Storage::int4 && s.ndim == 2;
    const int64_t rows = c.scale_per_row ? c.n : 1;
    check(is_floating(s.dtype) && s.is_contiguous() && s.device == c.x.device &&
              (grouped ? s.shape[0] == c.n : s.numel() == rows),
          kOp, ": weight_scale must be floating, contiguous, one number or one per output ", c.n,
          c.storage == Storage::int4 ? " or [out, groups]" : "", ", got ", s);
    check(c.groups >= 1 && c.k % c.groups == 0 && (c.groups == 1 || c.group() % 8 == 0), kOp,
          ": groups must divide the inputs ", c.k, " into multiples of 8, got weight_scale ", s);
    check(grouped || s.dtype == wide, kOp, ": weight_scale must be ", name_of(wide), ", got ", s);
  }
  if (!c.weight_zero) return;
  const TensorView& z = *c.weight_zero;
  check(c.storage == Storage::int4 && is_floating(c.x.dtype), kOp,
        ": weight_zero belongs to four-bit weights beside floating x, got x ", c.x, " and weight ", c.weight);
  check(is_matrix(z, c, c.n, c.groups) && z.is_contiguous() && (z.dtype == DType::u8 || is_floating(z.dtype)),
        kOp, ": weight_zero must be contiguous u8 or floating [", c.n, ", ", c.groups, "], got ", z);
}

void check_epilogue(const LinearCall& c) {
  const DType wide = acc_of(c.x.dtype);
  const auto number = [&](const TensorView& t) {
    return t.dtype == wide || t.dtype == c.out.dtype || t.dtype == c.x.dtype;
  };
  const auto kinds = [&](const char* name, const Optional& t) {
    check(!t || (is_floating(t->dtype) && number(*t) && (t->dtype != DType::f64 || wide == DType::f64)), kOp,
          ": ", name, " must be ", name_of(wide), " or of the dtype of out or x, got ", t);
  };
  kinds("bias", c.bias);
  kinds("gate", c.gate);
  kinds("residual", c.residual);
  check(!c.bias || is_vector(*c.bias, c, c.n), kOp, ": bias must be contiguous [", c.n, "], got ", c.bias);
  check(!c.gate || (c.gate->ndim == 2 && c.gate->shape[0] > 0 && c.m % c.gate->shape[0] == 0 &&
                    is_matrix(*c.gate, c, c.gate->shape[0], c.n)),
        kOp, ": gate must be [rows, ", c.n, "] with a divisor of ", c.m, " rows, got ", c.gate);
  check(!c.residual || is_matrix(*c.residual, c, c.m, c.n), kOp, ": residual must be [", c.m, ", ", c.n,
        "], got ", c.residual);
  check(!c.hidden == !c.up, kOp, ": hidden and up must be given together, got ", c.hidden, " and ", c.up);
  if (c.hidden) {
    check(c.hidden->dtype == wide && is_matrix(*c.hidden, c, c.m, c.rank), kOp, ": hidden must be ",
          name_of(wide), "[", c.m, ", rank], got ", c.hidden);
    check(is_floating(c.up->dtype) && is_matrix(*c.up, c, c.n, c.rank) &&
              (c.up->dtype != DType::f64 || wide == DType::f64),
          kOp, ": up must be floating [", c.n, ", ", c.rank, "], got ", c.up);
  }
}

void check_out(const LinearCall& c) {
  const DType wide = acc_of(c.x.dtype);
  check(is_matrix(c.out, c, c.m, c.n) && (is_floating(c.out.dtype) || c.out.dtype == DType::i8) &&
            (wide == DType::f64) == (c.out.dtype == DType::f64),
        kOp, ": out must be floating or int8 [", c.m, ", ", c.n, "], f64 as x is, got ", c.out);
  check(!c.out_scale == (c.out.dtype != DType::i8), kOp,
        ": out_scale must be given for int8 results, got out ", c.out, " and out_scale ", c.out_scale);
  check(!c.out_scale || (c.out_scale->dtype == DType::f32 && c.out_scale->numel() == 1 &&
                         c.out_scale->device == c.x.device),
        kOp, ": out_scale must be one f32 number, got ", c.out_scale);
  for (const Optional* in : {&c.x_scale, &c.weight_scale, &c.weight_zero, &c.bias, &c.hidden, &c.up, &c.gate})
    if (*in) check_apart(kOp, c.out, **in);
  check_apart(kOp, c.out, c.x);
  check_apart(kOp, c.out, c.weight);
  if (c.residual) check_no_partial_overlap(kOp, c.out, *c.residual);
}

// The rest of a call whose x and weight are checked.
void run(Stream stream, const LinearCall& c) {
  check_scales(c);
  check_epilogue(c);
  check_out(c);
  if (c.m == 0 || c.n == 0) return;
  if (c.x.device.type == DeviceType::cpu) return linear_cpu(c);
  if constexpr (kWithCuda) return linear_cuda(stream, c);
  fail_without_cuda(kOp);
}

}  // namespace

void linear(Stream stream, const TensorView& out, const TensorView& x, const Optional& x_scale,
            const TensorView& weight, const Optional& weight_scale, const Optional& weight_zero,
            const Optional& bias, const Optional& hidden, const Optional& up, const Optional& gate,
            const Optional& residual, const Optional& out_scale, const Optional& workspace,
            const std::string& activation) {
  LinearCall c{out,    x,  weight, x_scale,  weight_scale, weight_zero, bias,
               hidden, up, gate,   residual, out_scale,    workspace};
  c.epilogue = epilogue_of(activation);
  check(x.ndim == 2 && weight.ndim == 2, kOp, ": x and weight must have two axes, got ", x, " and ", weight);
  read_shapes(c);
  check_weight(c);
  run(stream, c);
}

void linear_gguf(Stream stream, const TensorView& out, const TensorView& x, const TensorView& blocks,
                 const Optional& weight_scale, const Optional& bias, const Optional& hidden,
                 const Optional& up, const Optional& gate, const Optional& residual,
                 const Optional& out_scale, const Optional& workspace, const std::string& activation,
                 const std::string& kind) {
  LinearCall c{.out = out,
               .x = x,
               .weight = blocks,
               .x_scale = {},
               .weight_scale = weight_scale,
               .weight_zero = {},
               .bias = bias,
               .hidden = hidden,
               .up = up,
               .gate = gate,
               .residual = residual,
               .out_scale = out_scale,
               .workspace = workspace};
  c.epilogue = epilogue_of(activation);
  check(x.ndim == 2 && blocks.ndim == 2, kOp, ": x and blocks must have two axes, got ", x, " and ", blocks);
  read_shapes(c);
  c.storage = Storage::gguf;
  c.gguf = gguf_of(kOp, kind);
  check(is_floating(x.dtype) && is_matrix(x, c, c.m, c.k), kOp,
        ": x must be floating [rows, in] with neighbours along the last axis adjacent, got ", x);
  check_blocks(kOp, blocks, c.gguf, c.k);
  check(blocks.device == x.device, kOp, ": blocks must be on the device of x ", x, ", got ", blocks);
  run(stream, c);
}

void dequantize_gguf(Stream stream, const TensorView& out, const TensorView& blocks,
                     const std::string& kind) {
  constexpr const char* kName = "dequantize_gguf";
  const Gguf type = gguf_of(kName, kind);
  check(is_floating(out.dtype) && out.ndim == 2 && out.is_contiguous() && out.device == blocks.device, kName,
        ": out must be contiguous floating [rows, numbers] on the device of blocks ", blocks, ", got ", out);
  check_blocks(kName, blocks, type, out.shape[1]);
  check(blocks.shape[0] == out.shape[0], kName, ": out must have the rows of blocks ", blocks, ", got ", out);
  check_apart(kName, out, blocks);
  if (out.numel() == 0) return;
  if (out.device.type == DeviceType::cpu) return dequantize_gguf_cpu(out, blocks, type);
  if constexpr (kWithCuda) return dequantize_gguf_cuda(stream, out, blocks, type);
  fail_without_cuda(kName);
}

}  // namespace rfk
