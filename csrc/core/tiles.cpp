#include "core/tiles.h"

#include <algorithm>
#include <string>

#include "core/check.h"

namespace rfk {
namespace {

enum Level { kGeneric, kAvx2, kAvxVnni, kAvx512, kAvx512Vnni, kAvx512Bf16, kLevels };
constexpr const char* kNames[] = {"generic", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16"};

#ifdef __x86_64__
void take(Tiles& to, const Tiles& from, Product p) { to[p] = from[p]; }

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
    if (level == kAvx2) take(t, kTilesAvx2, Product::f32), take(t, kTilesAvx2, Product::int8);
    if (level == kAvx2 || level == kAvx512) t.vectors = level == kAvx2 ? VectorSet::avx2 : VectorSet::avx512;
    if (level == kAvxVnni) take(t, kTilesAvxVnni, Product::int8);
    if (level == kAvx512) take(t, kTilesAvx512, Product::f32);
    if (level == kAvx512Vnni) take(t, kTilesAvx512, Product::int8);
    if (level == kAvx512Bf16) take(t, kTilesAvx512, Product::bf16), t.int4 = kInt4TileAvx512;
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

bool limit_instructions(const std::string& name) {
  const auto* found = std::find(std::begin(kNames), std::end(kNames), name);
  check(found != std::end(kNames), "limit_instructions: unknown instruction set ", name);
  const Level level = Level(found - kNames);
  chosen() = choose(level);
  return has(level);
}

}  // namespace rfk
