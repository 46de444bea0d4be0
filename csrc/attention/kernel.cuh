#pragma once

#include "attention/products.cuh"
#include "core/launch.cuh"

// Attention on tensor cores. A block has 4 warps, each with 16 or 32 rows of Q and all keys; tiles of 64 keys
// of K and of V pass by turns through a ring of slots in shared memory.

namespace rfk {

// Copies tiles of K and V of one head into slots.
template <typename Kind, int D> struct TileCopy {
  static constexpr AttentionTile kTile = KernelTile<Kind, D>::kTile;
  static constexpr int kThreads = KernelTile<Kind, D>::kThreads;
  static constexpr int kBytes = Kind::kScoreBytes;
  using Element = std::conditional_t<kBytes == 1, uint8_t, uint16_t>;
  const AttentionArgs& args;
  const Work& w;

  __device__ int row_bytes() const { return (kBytes == 1 ? D : args.d) * kBytes; }  // of Q and K
  __device__ const uint8_t* from(const Tokens& t, int token, int bytes) const {
    return static_cast<const uint8_t*>(t.data) + t.at(w.key_sample, w.kv_head, token) * bytes;
  }
  // The tile of codes and the head, of a key, among those of the workspace
  __device__ int64_t of_codes(int key) const {
    return int64_t(w.first_tile + key / kCodeTile) * args.kv_heads + w.kv_head;
  }
  // Numbers of four bytes beside a tile, by pieces of 16; the memory has whole pieces
  __device__ static void scales(uint8_t* slot, const float* numbers, int count) {
    for (int i = 4 * int(threadIdx.x); i < count; i += 4 * kThreads)
      cp_async<16>(slot + kTile.scales + 4 * i, numbers + i);
  }

  __device__ void queries(uint8_t* to) const {
    const int64_t first = args.q.at(w.sample, w.head, w.first_row) * kBytes;
    copy_rows<kTile.rows(), D * kBytes, kTile.score_pitch, kThreads, Element>(
        to, static_cast<const uint8_t*>(args.q.data) + first, args.q.token * kBytes, row_bytes(), w.rows,
        args.pieces);
  }

  __device__ void keys(uint8_t* slot, int tile) const {
    const int first = tile * kTile.keys;
    copy_rows<kTile.keys, D * kBytes, kTile.score_pitch, kThreads, Element>(
        slot, from(args.k, w.first_key + first, kBytes), args.k.token * kBytes, row_bytes(), w.keys - first,
        args.pieces);
    if constexpr (kBytes == 1)
      scales(slot, args.eight.k_scale + of_codes(first) * kCodeTile + first % kCodeTile, kTile.keys);
  }

  __device__ void values(uint8_t* slot, int tile) const {
    const int first = tile * kTile.keys;
    if constexpr (Kind::kValueBytes == 2) {
      copy_rows<kTile.keys, 2 * D, kTile.value_pitch, kThreads>(slot, from(args.v, w.first_key + first, 2),
                                                                2 * args.v.token, 2 * args.d, w.keys - first,
                                                                args.v_pieces);
    } else {
      const int64_t at = of_codes(first) * D;
      copy_rows<D, kTile.keys, kTile.value_pitch, kThreads, uint8_t>(
          slot, args.eight.v_codes + at * kCodeTile + first % kCodeTile, kCodeTile, kTile.keys, D, true);
      scales(slot, args.eight.v_scale + at, D);
    }
  }
};

template <typename T, int D, int Pieces>
__device__ __forceinline__ void store_rows(const float (&o)[Pieces][D / 8][4], const OfRows<Pieces>& inverse,
                                           const AttentionArgs& args, const Work& w, int warp_row) {
  for_rows<Pieces>([&](int i, int h, int row) {
    if (warp_row + row >= w.rows) return;
    T* const to = out_of<T>(args, w, warp_row + row);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      const int c = 8 * j + 2 * int(threadIdx.x % 4);
      const float x = o[i][j][2 * h] * inverse[i][h], y = o[i][j][2 * h + 1] * inverse[i][h];
      if (c < args.d && args.out_pairs) {
        struct alignas(2 * sizeof(T)) Pair {
          T x, y;
        };
        *reinterpret_cast<Pair*>(to + c) = {store<T>(x), store<T>(y)};
      } else {
        if (c < args.d) to[c] = store<T>(x);
        if (c + 1 < args.d) to[c + 1] = store<T>(y);
      }
    }
  });
}

// f.operator()<T>() with the type of the result of a kind: its own in 16 bits, any for codes.
template <typename Kind, typename F>
__device__ __forceinline__ void dispatch_result(const AttentionArgs& args, F f) {
  if constexpr (Kind::kScoreBytes == 2)
    f.template operator()<typename Kind::Element>();
  else if (args.dtype == DType::f32)
    f.template operator()<float>();
  else if (args.dtype == DType::bf16)
    f.template operator()<bf16>();
  else
    f.template operator()<f16>();
}

template <typename Kind, int D, int Pieces>
__device__ __forceinline__ void finish_rows(const float (&o)[Pieces][D / 8][4], RowSums<Pieces>& rows,
                                            const AttentionArgs& args, const Work& w, int warp_row) {
  constexpr float kLn2 = 0.6931471805599453f, kLnTop = Kind::kTop == 255   ? 5.541263545158426f
                                                       : Kind::kTop == 448 ? 6.104793232414985f
                                                                           : 0.0f;
  OfRows<Pieces> inverse;
  for_rows<Pieces>([&](int i, int h, int row) {
    const float sum = sum_of_quad(rows.sum[i][h]);
    inverse[i][h] = sum == 0 ? 0.0f : 1 / sum;
    if (threadIdx.x % 4 != 0 || warp_row + row >= w.rows) return;
    float lse = std::fma(rows.top[i][h], kLn2, std::log(sum) - kLnTop);
    if constexpr (Kind::kScoreBytes == 1)  // scores of k - mean are less by this
      lse +=
          args.eight
              .q_mean[(int64_t(w.sample) * args.heads + w.head) * args.rows + w.first_row + warp_row + row];
    lse_of<float>(args, w)[warp_row + row] = sum == 0 ? -INFINITY : lse;
  });
  dispatch_result<Kind>(args, [&]<typename T>() { store_rows<T, D, Pieces>(o, inverse, args, w, warp_row); });
}

// What a block has in shared memory because it takes no registers there, of which there are none to spare:
// its work; of its rows, units of codes, and where values are codes the largest score so far and the sum of
// weights.
template <typename Kind, int D> struct alignas(16) BlockMemory {
  static constexpr int kRows = KernelTile<Kind, D>::kTile.rows();
  static constexpr bool kHasUnits = Kind::kScoreBytes == 1, kKeeps = Kind::kValueBytes == 1;
  Work work;
  float2 kept[kKeeps ? kRows : 1];
  float units[kHasUnits ? kRows : 1];

  __device__ void fill(const AttentionArgs& args, const Work& w) {
    const int row = int(threadIdx.x);
    if (row == 0) work = w;
    if (kKeeps && row < kRows) kept[row] = {-INFINITY, 0};
    const int64_t first = (int64_t(w.sample) * args.heads + w.head) * args.rows + w.first_row;
    if (kHasUnits && row < kRows)
      units[row] = row < w.rows ? args.unit * args.eight.q_scale[first + row] : 0.0f;
    __syncthreads();
  }
};

// What one warp keeps from tile to tile.
template <typename Kind, int D> struct WarpRows {
  static constexpr int kPieces = KernelTile<Kind, D>::kPieces, kKeys = KernelTile<Kind, D>::kKeys;
  static constexpr bool kKept = BlockMemory<Kind, D>::kKeeps;
  const AttentionArgs& args;
  BlockMemory<Kind, D>& memory;
  typename KernelTile<Kind, D>::Outputs o = {};
  RowSums<kPieces> rows;
  Weights<Kind, kKeys> p[kPieces];
  OfRows<kPieces> added;

  __device__ WarpRows(const AttentionArgs& args, BlockMemory<Kind, D>& memory) : args(args), memory(memory) {}
  __device__ int row() const {
    return int(opaque(threadIdx.x) / 32 * 16 * kPieces);
  }  // of the warp, in the tile
  __device__ bool has_rows() const { return row() < memory.work.rows; }

  __device__ void read_sums(float& top, float& sum, int i, int h, int r) const {
    top = kKept ? memory.kept[r].x : rows.top[i][h];
    sum = !kKept ? rows.sum[i][h] : threadIdx.x % 4 == 0 ? memory.kept[r].y : 0.0f;
  }
  __device__ void write_sums(float top, float sum, int i, int h, int r) {
    if constexpr (kKept) {
      sum = sum_of_quad(sum);
      __syncwarp();  // its lanes have read them
      if (threadIdx.x % 4 == 0) memory.kept[r] = {top, sum};
    } else {
      rows.top[i][h] = top, rows.sum[i][h] = sum;
    }
  }
  __device__ void finish() {
    if constexpr (kKept) {
      __syncwarp();
      for_rows<kPieces>(
          [&](int i, int h, int r) { read_sums(rows.top[i][h], rows.sum[i][h], i, h, row() + r); });
    }
    finish_rows<Kind, D, kPieces>(o, rows, args, memory.work, row());
  }

  __device__ void weigh(const uint8_t* q, const uint8_t* slot, int tile) {
    const int row = this->row();
    const Work& w = memory.work;
    Scores<kPieces, kKeys> s;
    multiply_keys<Kind, D, kKeys, kPieces>(s, q + row * KernelTile<Kind, D>::kTile.score_pitch, slot);
    const auto unit = [&](int r) { return Kind::kScoreBytes == 1 ? memory.units[row + r] : args.unit; };
    const bool late = args.scales_late();
    if (!late) scale_scores<kKeys, kPieces>(s, unit, args, w, row, tile);
    if (w.keys < (tile + 1) * kKeys) hide_keys<kKeys, kPieces>(s, w.keys - tile * kKeys);
    for_rows<kPieces>([&](int i, int h, int r) {
      float top, sum;
      read_sums(top, sum, i, h, row + r);
      const float old = exponentiate<Kind, kKeys>(s[i], h, late ? unit(r) : 1.0f, top, sum, added[i][h]);
      write_sums(top, sum, i, h, row + r);
      if (__all_sync(0xffffffffu, old == 1)) return;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) o[i][j][2 * h] *= old, o[i][j][2 * h + 1] *= old;
    });
    if constexpr (Kind::kValues == Values::sixteen)
      if (args.factor) multiply_factor<kKeys, kPieces>(s, args, w, row, tile);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) pack_weights<Kind, kKeys>(p[i], s[i]);
  }

  __device__ void add_values(const uint8_t* slot) {
    if constexpr (Kind::kValues == Values::sixteen)
      multiply_values<Kind, D, kKeys, kPieces>(o, p, slot);
    else
      multiply_codes<Kind, D, kKeys, kPieces>(o, p, slot, added);
  }
};

template <typename Kind, int D>
__global__ void __launch_bounds__(KernelTile<Kind, D>::kThreads, 2) attention_kernel(AttentionArgs args) {
  using K = KernelTile<Kind, D>;
  constexpr AttentionTile kTile = K::kTile;
  if constexpr (Kind::kRuns) {
    const Work found = find_work<kTile.rows()>(args);
    if (!found.valid)
      return dispatch_result<Kind>(args, [&]<typename T>() { fill_with_nan<T>(args, found); });
    if (found.rows <= 0 || is_of_another_kernel(args, found)) return;
    uint8_t *const q = dynamic_shared<uint8_t>(), *const ring = q + kTile.q_bytes;
    auto& memory = *reinterpret_cast<BlockMemory<Kind, D>*>(q + kTile.shared());
    memory.fill(args, found);
    const Work& w = memory.work;

    const auto seen = [&](int tile) { return tile * kTile.keys < w.keys; };
    const TileCopy<Kind, D> copy{args, w};
    const auto slot_after = [](int slot, int steps) { return (slot + steps) % K::kSlots; };
    const auto slot_memory = [&](int slot) { return ring + slot * kTile.slot_bytes; };

    int tile = next_tile<kTile.keys>(w, 0), slot = 0;
    if (seen(tile)) {
      copy.queries(q);
      copy.keys(slot_memory(0), tile);
      cp_async_commit();
      if (K::kSlots == 3) copy.values(slot_memory(1), tile);
      if (K::kSlots == 3) cp_async_commit();
    }
    WarpRows<Kind, D> warp(args, memory);
#pragma unroll 1
    while (seen(tile)) {
      const int next = next_tile<kTile.keys>(w, tile + 1);
      const bool more = seen(next);
      cp_async_wait<K::kSlots - 2>();
      __syncthreads();  // K is there, and the slot written next has been read by all; so below with V
      if (K::kSlots == 2)
        copy.values(slot_memory(slot_after(slot, 1)), tile);
      else if (more)
        copy.keys(slot_memory(slot_after(slot, 2)), next);
      cp_async_commit();
      if (warp.has_rows()) warp.weigh(q, slot_memory(slot), tile);
      slot = slot_after(slot, 1);

      cp_async_wait<K::kSlots - 2>();
      __syncthreads();
      if (more)
        K::kSlots == 2 ? copy.keys(slot_memory(slot_after(slot, 1)), next)
                       : copy.values(slot_memory(slot_after(slot, 2)), next);
      cp_async_commit();
      if (warp.has_rows()) warp.add_values(slot_memory(slot));
      slot = slot_after(slot, 1);
      tile = next;
    }
    cp_async_wait<0>();
    if (warp.has_rows()) warp.finish();
  }
}

template <typename Kind> void launch_attention(Stream stream, const AttentionArgs& args) {
  const auto run = [&]<int D>() {
    constexpr AttentionTile kTile = KernelTile<Kind, D>::kTile;
    launch("attention", attention_kernel<Kind, D>, attention_grid(args, kTile.rows()),
           dim3(KernelTile<Kind, D>::kThreads), kTile.shared() + sizeof(BlockMemory<Kind, D>),
           cudaStream_t(stream), args);
  };
  switch (padded_head(args.d, Kind::kScoreBytes)) {
    case 64: return run.template operator()<64>();
    case 80:
      if constexpr (Kind::kScoreBytes == 2) return run.template operator()<80>();
    case 96: return run.template operator()<96>();
    case 128: return run.template operator()<128>();
    default: return run.template operator()<256>();
  }
}

}  // namespace rfk
