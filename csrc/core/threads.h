#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <cstdint>

namespace rfk {

// Threads of a product of that many multiplications.
inline int threads_for([[maybe_unused]] int64_t work) {
#ifdef _OPENMP
  constexpr int64_t kWorth = 1 << 17;  // multiplications that outweigh waking a thread
  return int(std::clamp<int64_t>(work / kWorth, 1, omp_in_parallel() ? 1 : omp_get_max_threads()));
#else
  return 1;
#endif
}

// The number of the calling thread in its team.
inline int thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace rfk
