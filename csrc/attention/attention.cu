#include "attention/kernels.h"
#include "attention/quantize.h"
#include "core/launch.cuh"

namespace rfk {
namespace {

void run_full(Stream stream, const AttentionArgs& args) {
  if (args.dtype == DType::bf16) return attention_bf16(stream, args);
  if (args.dtype == DType::f16) return attention_f16(stream, args);
  attention_fma(stream, args);
}

// Weights that a factor has multiplied are neither positive nor bounded: they stay in 16 bits.
ValuesBecome values_of(const AttentionCall& call, const AttentionArgs& args) {
  const bool e4m3 = call.precision == Precision::fp8;
  if (args.factor || (e4m3 && !multiplies_e4m3(call.q.device.index)))
    return args.dtype == DType::f32 ? ValuesBecome::bf16 : ValuesBecome::nothing;
  return e4m3 ? ValuesBecome::e4m3 : ValuesBecome::int8;
}

// The call of the kernels that multiply codes.
AttentionArgs coded_args(const Quantization& call) {
  AttentionArgs a = call.args;
  const int64_t d = padded_head(a.d, 1);
  const auto dense = [&](void* data, int64_t heads, int64_t tokens) {
    return Tokens(data, heads * tokens * d, tokens * d, d);
  };
  a.q = dense(call.to.q, a.heads, a.rows), a.k = dense(call.to.k, a.kv_heads, a.keys);
  if (call.values == ValuesBecome::bf16) a.v = dense(call.to.v, a.kv_heads, a.keys), a.v_pieces = true;
  a.eight = call.to.eight;
  return a;
}

void run_coded(Stream stream, const AttentionArgs& args, ValuesBecome values) {
  if (values == ValuesBecome::int8) return attention_int8(stream, args);
  if (values == ValuesBecome::e4m3) return attention_e4m3(stream, args);
  if (args.dtype == DType::f16) return attention_int8_f16(stream, args);
  attention_int8_bf16(stream, args);
}

}  // namespace

void attention_cuda(Stream stream, const AttentionCall& call) {
  const DeviceGuard guard(call.q.device.index);
  AttentionArgs args = attention_args(call);
  if (!call.eight_bits()) return run_full(stream, args);

  Quantization to_codes{args, workspace_of(args, call.batch, call.workspace->data)};
  to_codes.key_mean = call.key_mean ? call.key_mean->ptr<const float>() : nullptr;
  to_codes.values = values_of(call, args);
  to_codes.with_stats = call.precision == Precision::automatic;
  attention_quantize(stream, to_codes);
  AttentionArgs coded = coded_args(to_codes);
  if (to_codes.with_stats) {
    uint8_t* const fell_back = call.fell_back->ptr<uint8_t>();
    attention_decide(stream, to_codes, fell_back);
    args.fell_back = coded.fell_back = fell_back;
    args.takes = 1, coded.takes = 0;
    run_full(stream, args);
  }
  run_coded(stream, coded, to_codes.values);
}

int64_t attention_workspace_cuda(const AttentionCall& call) {
  return call.eight_bits() ? workspace_of(attention_args(call), call.batch, nullptr).bytes : 0;
}

}  // namespace rfk
