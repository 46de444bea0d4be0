#include "attention/attention.h"

#include <algorithm>

#include "attention/call.h"
#include "core/backend.h"
#include "core/check.h"

namespace rfk {
namespace {

constexpr const char* kOp = "attention";

bool one_or(int64_t length, int64_t axis) { return length == 1 || length == axis; }

// What `read_shapes` and the sizes of a plan rest on.
void check_axes(std::initializer_list<const TensorView*> tokens,
                std::initializer_list<const Optional*> starts) {
  for (const TensorView* t : tokens)
    check(t->ndim == 4, kOp, ": q, k and v must be [batch, heads, tokens, d], got ", *t);
  for (const Optional* s : starts)
    check(!*s || ((*s)->ndim == 1 && (*s)->shape[0] >= 2), kOp,
          ": cu_seqlens must be i32[sequences + 1], got ", *s);
}

void check_heads(const AttentionCall& c) {
  check(1 <= c.d && c.d <= kMaxHeadDim, kOp, ": d must be 1..", kMaxHeadDim, ", got ", c.d, " in q ", c.q);
  check(c.kv_heads >= 1 && c.heads % c.kv_heads == 0, kOp, ": the heads of k must divide those of q, got q ",
        c.q, " and k ", c.k);
}

void check_tokens(const AttentionCall& c) {
  const auto adjacent = [](const TensorView& t) { return t.shape[3] <= 1 || t.stride[3] == 1; };
  const auto like_q = [&](const TensorView& t) { return t.dtype == c.q.dtype && t.device == c.q.device; };
  check(is_floating(c.q.dtype) && adjacent(c.q), kOp,
        ": q must be floating [batch, heads, rows, d] with neighbours along d adjacent, got ", c.q);
  check_heads(c);
  for (const TensorView* t : {&c.k, &c.v})
    check(t->has_shape({c.batch, c.kv_heads, c.keys, c.d}) && like_q(*t) && adjacent(*t), kOp,
          ": k and v must be [batch, kv_heads, keys, d] of the dtype and device of q ", c.q, ", got k ", c.k,
          " and v ", c.v);
  check(c.rows < INT32_MAX && c.keys < INT32_MAX, kOp, ": expected fewer than 2^31 tokens, got q ", c.q,
        " and k ", c.k);
  check(std::isfinite(c.scale), kOp, ": scale must be finite, got ", c.scale);
  check(c.out.has_shape({c.batch, c.heads, c.rows, c.d}) && like_q(c.out) && adjacent(c.out), kOp,
        ": out must be like q ", c.q, ", got ", c.out);
  check(c.lse.has_shape({c.batch, c.heads, c.rows}) && c.lse.dtype == acc_of(c.q.dtype) &&
            c.lse.device == c.q.device && c.lse.is_contiguous(),
        kOp, ": lse must be contiguous ", name_of(acc_of(c.q.dtype)), "[", c.batch, ", ", c.heads, ", ",
        c.rows, "], got ", c.lse);
}

void check_tables(const AttentionCall& c) {
  const DType wide = acc_of(c.q.dtype);
  if (c.bias) {
    const TensorView& b = *c.bias;
    check(b.ndim == 4 && one_or(b.shape[0], c.batch) && one_or(b.shape[1], c.heads) &&
              one_or(b.shape[2], c.rows) && b.shape[3] == c.keys && (c.keys <= 1 || b.stride[3] == 1) &&
              b.device == c.q.device,
          kOp, ": bias must be [", c.batch, " or 1, ", c.heads, " or 1, ", c.rows, " or 1, ", c.keys,
          "] with neighbours along the keys adjacent, got ", b);
    check(b.dtype == wide || b.dtype == c.q.dtype, kOp, ": bias must be ", name_of(wide),
          " or of the dtype of q ", c.q, ", got ", b);
  }
  if (c.factor) {
    const TensorView& f = *c.factor;
    check(f.ndim == 2 && one_or(f.shape[0], c.heads) && f.shape[1] == c.rows + c.keys - 1 &&
              f.dtype == wide && f.device == c.q.device && f.is_contiguous(),
          kOp, ": factor must be contiguous ", name_of(wide), "[", c.heads, " or 1, ", c.rows + c.keys - 1,
          "], got ", f);
  }
  if (c.block_mask) {
    const TensorView& m = *c.block_mask;
    const int64_t down = (c.rows + kBlockRows - 1) / kBlockRows,
                  across = (c.keys + kBlockKeys - 1) / kBlockKeys;
    check(m.ndim == 4 && one_or(m.shape[0], c.batch) && one_or(m.shape[1], c.heads) && m.shape[2] == down &&
              m.shape[3] == across && m.dtype == DType::u8 && m.device == c.q.device &&
              (across <= 1 || m.stride[3] == 1),
          kOp, ": block_mask must be bool [", c.batch, " or 1, ", c.heads, " or 1, ", down, ", ", across,
          "], blocks of ", kBlockRows, " rows and ", kBlockKeys, " keys, got ", m);
  }
  if (c.head_shift)
    check(c.head_shift->has_shape({c.kv_heads}) && c.head_shift->dtype == DType::i32 &&
              c.head_shift->device == c.q.device && c.head_shift->is_contiguous(),
          kOp, ": head_shift must be i32[", c.kv_heads, "], got ", c.head_shift);
  check(c.frames >= 1 && c.batch % c.frames == 0, kOp, ": frames must divide the batch ", c.batch, ", got ",
        c.frames);
}

// On the CPU the numbers can be read.
void check_starts(const char* name, const TensorView& starts, int64_t tokens) {
  if (starts.device.type != DeviceType::cpu) return;
  const int32_t* at = starts.ptr<int32_t>();
  const int64_t last = starts.shape[0] - 1;
  check(at[0] == 0 && at[last] == tokens, kOp, ": ", name, " must go from 0 to the number of tokens ", tokens,
        ", got ", at[0], " .. ", at[last]);
  for (int64_t i = 0; i < last; ++i)
    check(at[i] <= at[i + 1], kOp, ": ", name, " must not decrease, got ", at[i], " before ", at[i + 1]);
}

void check_sequences(const AttentionCall& c) {
  const auto integers = [&](const Optional& t, int64_t length) {
    return t && t->has_shape({length}) && t->dtype == DType::i32 && t->device == c.q.device &&
           t->is_contiguous();
  };
  if (c.key_lengths) {
    check(integers(c.key_lengths, c.batch), kOp, ": key_lengths must be i32[", c.batch, "], got ",
          c.key_lengths);
    if (c.q.device.type == DeviceType::cpu)
      for (int64_t b = 0; b < c.batch; ++b) {
        const int32_t length = c.key_lengths->ptr<int32_t>()[b];
        check(0 <= length && length <= c.keys, kOp, ": key_lengths must be 0..", c.keys, ", got ", length);
      }
  }
  check(!c.q_starts == !c.k_starts, kOp, ": cu_seqlens of queries and keys must be given together, got ",
        c.q_starts, " and ", c.k_starts);
  if (!c.q_starts) return;
  check(c.batch == 1 && !c.bias && !c.factor && !c.key_lengths && !c.block_mask && !c.head_shift, kOp,
        ": cu_seqlens goes with a batch of 1 and without bias, factor, key_lengths, block_mask and "
        "head_shift, got q ",
        c.q);
  check(c.sequences >= 1 && integers(c.q_starts, c.sequences + 1) && integers(c.k_starts, c.sequences + 1),
        kOp, ": cu_seqlens must be i32[sequences + 1], of queries and of keys, got ", c.q_starts, " and ",
        c.k_starts);
  check_starts("cu_seqlens", *c.q_starts, c.rows);
  check_starts("cu_seqlens of the keys", *c.k_starts, c.keys);
}

void check_eight_bits(const AttentionCall& c) {
  check(!c.eight_bits() || c.q.dtype != DType::f64, kOp,
        ": precision must be full for float64 tensors, got q ", c.q);
  check(!c.key_mean ||
            (c.key_mean->has_shape({c.sequences, c.kv_heads, c.d}) && c.key_mean->dtype == DType::f32 &&
             c.key_mean->device == c.q.device && c.key_mean->is_contiguous()),
        kOp, ": key_mean must be contiguous f32[", c.sequences, ", ", c.kv_heads, ", ", c.d, "], got ",
        c.key_mean);
  const bool automatic = c.precision == Precision::automatic;
  check(
      automatic == c.fell_back.has_value() &&
          (!automatic || (c.fell_back->has_shape({c.sequences, c.heads}) && c.fell_back->dtype == DType::u8 &&
                          c.fell_back->device == c.q.device && c.fell_back->is_contiguous())),
      kOp, ": fell_back must be given for auto alone, u8[", c.sequences, ", ", c.heads, "], got ",
      c.fell_back);
}

void check_memory(const AttentionCall& c, int64_t workspace) {
  check(workspace == 0 || (c.workspace && c.workspace->dtype == DType::u8 && c.workspace->is_contiguous() &&
                           c.workspace->numel() >= workspace && c.workspace->device == c.q.device),
        kOp, ": workspace must be contiguous u8[", workspace, "], got ", c.workspace);
  for (const TensorView* t : {&c.q, &c.k, &c.v}) check_apart(kOp, c.out, *t);
  for (const Optional* t :
       {&c.bias, &c.factor, &c.key_lengths, &c.q_starts, &c.k_starts, &c.block_mask, &c.key_mean})
    if (*t) check_apart(kOp, c.out, **t);
  check_apart(kOp, c.out, c.lse);
}

}  // namespace

Precision precision_of(const std::string& name) {
  constexpr const char* kNames[] = {"full", "int8", "fp8", "auto"};
  const auto* found = std::find(std::begin(kNames), std::end(kNames), name);
  check(found != std::end(kNames), kOp, ": precision must be full, int8, fp8 or auto, got ", name);
  return Precision(found - kNames);
}

void attention(Stream stream, const TensorView& out, const TensorView& lse, const TensorView& q,
               const TensorView& k, const TensorView& v, const Optional& bias, const Optional& factor,
               const Optional& key_lengths, const Optional& q_starts, const Optional& k_starts,
               const Optional& block_mask, const Optional& head_shift, const Optional& key_mean,
               const Optional& fell_back, const Optional& workspace, double scale, int64_t frames,
               const std::string& precision) {
  AttentionCall c{out,      lse,      q,          k,          v,        bias,      factor,   key_lengths,
                  q_starts, k_starts, block_mask, head_shift, key_mean, fell_back, workspace};
  c.scale = scale;
  c.frames = frames;
  c.precision = precision_of(precision);
  check_axes({&q, &k, &v}, {&q_starts, &k_starts});
  read_shapes(c);
  check_tokens(c);
  check_tables(c);
  check_sequences(c);
  check_eight_bits(c);
  check_memory(c, attention_workspace(q, k, q_starts, precision));
  if (q.numel() == 0) return;
  if (q.device.type == DeviceType::cpu) return attention_cpu(c);
  if constexpr (kWithCuda) return attention_cuda(stream, c);
  fail_without_cuda(kOp);
}

int64_t attention_workspace(const TensorView& q, const TensorView& k, const Optional& q_starts,
                            const std::string& precision) {
  check_axes({&q, &k}, {&q_starts});
  AttentionCall c;
  c.q = q;
  c.k = k;
  c.q_starts = q_starts;
  c.precision = precision_of(precision);
  read_shapes(c);
  check_heads(c);
  if (q.device.type == DeviceType::cpu) return attention_workspace_cpu(c);
  if constexpr (kWithCuda) return attention_workspace_cuda(c);
  fail_without_cuda(kOp);
}

}  // namespace rfk
