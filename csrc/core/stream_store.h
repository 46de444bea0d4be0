#pragma once

#include <cstdint>
#include <cstring>
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace rfk {

// A result larger than the private caches is written past them: an ordinary store first reads
// the line that it is about to overwrite, one pass over memory more than the op needs.
inline bool should_stream(const void* out, int64_t bytes) {
#ifdef __SSE2__
  constexpr int64_t kCacheBytes = 4 << 20;
  return bytes > kCacheBytes && reinterpret_cast<uintptr_t>(out) % 16 == 0;
#else
  (void)out, (void)bytes;
  return false;
#endif
}

// Copies to 16-byte aligned memory without reading it; seen by other threads after `stream_fence`.
inline void stream_store(void* out, const void* in, int64_t bytes) {
#ifdef __SSE2__
  auto* to = static_cast<__m128i*>(out);
  const auto* from = static_cast<const __m128i*>(in);
  for (int64_t i = 0; i < bytes / 16; ++i) _mm_stream_si128(to + i, _mm_load_si128(from + i));
  const int64_t done = bytes / 16 * 16;
  std::memcpy(static_cast<char*>(out) + done, static_cast<const char*>(in) + done, bytes - done);
#else
  std::memcpy(out, in, bytes);
#endif
}

inline void stream_fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace rfk
