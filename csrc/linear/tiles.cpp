#include "linear/tiles.h"

#include <algorithm>

#include "core/check.h"
#include "linear/linear.h"

namespace rfk {
namespace {

enum Level { kGeneric, kAvx2, kAvxVnni, kAvx512, kAvx512Vnni, kAvx512Bf16, kLevels };
constexpr const char* kNames[] = {"generic", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16"};

#ifdef __x86_64__
template <typename F> void take(F (&to)[kTileShapes], const F (&from)[kTileShapes]) {
  std::copy(from, from + kTileShapes, to);
}

void take_direct(Tiles& to, const Tiles& from, Product p) { take(to.direct[int(p)], from.direct[int(p)]); }

bool has(Level level) {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (level) {
    case kAvx2: return avx2;
    case kAvxVnni: return avx2 && __builtin_cpu_supports("avxvnni");
    case kAvx512: return avx512;
    case kAvx512Vnni: return avx512 && __builtin_cpu_supports("avx512vnni");
    case kAvx512Bf16: return has(kAvx512Vnni) && __builtin_cpu_supports("avx512bf16");
    default: return true;
  }
}

// The products of every level up to this one that the CPU has.
Tiles choose(Level most) {
  Tiles t = kTilesGeneric;
  for (int level = kAvx2; level <= most; ++level) {
    if (!has(Level(level))) continue;
    if (level == kAvx2) take(t.int8, kTilesAvx2.int8), take(t.f32, kTilesAvx2.f32);
    if (level == kAvxVnni) take(t.int8, kTilesAvxVnni.int8);
    if (level == kAvx512) take(t.f32, kTilesAvx512.f32), take_direct(t, kTilesAvx512, Product::f32);
    if (level == kAvx512Vnni) take(t.int8, kTilesAvx512.int8), take_direct(t, kTilesAvx512, Product::int8);
    if (level == kAvx512Bf16)
      take(t.bf16, kTilesAvx512.bf16), take_direct(t, kTilesAvx512, Product::bf16), t.int4 = kInt4TileAvx512;
  }
  return t;
}
#else
bool has(Level level) { return level == kGeneric; }
Tiles choose(Level) { return kTilesGeneric; }
#endif

Tiles& chosen() {
  static Tiles t = choose(kAvx512Bf16);
  return t;
}

}  // namespace

const Tiles& tiles() { return chosen(); }

int64_t linear_roof(const std::string& product, int64_t repeats) {
  constexpr const char* kProducts[] = {"int8", "bf16", "f32"};
  const auto* found = std::find(std::begin(kProducts), std::end(kProducts), product);
  check(found != std::end(kProducts), "linear_roof: product must be int8, bf16 or f32, got ", product);
  const Product kind = Product(found - kProducts);
  const TileFunction multiply = tiles().of(kind, kTile12x32);
  check(multiply, "linear_roof: this CPU has no ", product, " products");
  constexpr int64_t kSteps = 128;
  int64_t threads = 0;
#pragma omp parallel reduction(+ : threads)
  {
    alignas(64) float a[kSteps * 12] = {}, b[kSteps * 32] = {}, c[12 * 32];
    ++threads;
    for (int64_t i = 0; i < repeats; ++i) multiply(kSteps, a, b, c, Into::set, {});
  }
  const int64_t numbers[] = {4, 2, 1};
  return threads * repeats * kSteps * 12 * 32 * 2 * numbers[int(kind)];
}

bool limit_linear_instructions(const std::string& name) {
  const auto* found = std::find(std::begin(kNames), std::end(kNames), name);
  check(found != std::end(kNames), "limit_linear_instructions: unknown instruction set ", name);
  const Level level = Level(found - kNames);
  chosen() = choose(level);
  return has(level);
}

}  // namespace rfk
