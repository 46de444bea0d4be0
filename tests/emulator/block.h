#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>
#include <type_traits>

// The execution of one grid: every CUDA thread is a fiber, every block runs alone, its warps in a random
// order. A thread runs until it meets others (barrier, shuffle, vote, mma) or returns.

namespace emulator {

using Where = std::source_location;

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// What the running thread sees of itself; `threadIdx` and the like read it.
struct Self {
  Dim thread_index, block_index, block_dim, grid_dim;
};
extern Self self;

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;
// What the smallest of the listed architectures offers (sm_86, 89, 120; static and per default 48 KB).
inline constexpr size_t kMaxDynamicShared = 99 << 10, kMaxStaticShared = 48 << 10;

struct Launch {
  const char* what;
  Dim grid, block;
  size_t shared_bytes;
  void (*thread)(void*);  // calls the kernel, with arg
  void* arg;
  size_t arg_bytes;  // the kernel's parameters: its threads may read them
};

// Runs the grid; throws std::runtime_error for what a device would do wrong or undefined.
void run(const Launch& launch);

// The order of blocks and warps is a function of this seed and of the launches since.
void set_seed(uint64_t seed);

// How many multiprocessors the device says it has.
inline int processors = 1;

// Whether the device says that it multiplies e4m3.
inline bool e4m3 = true;

// --- called by kernels ---

// The error of the running thread: the launch ends with it.
[[noreturn]] void fail(const std::string& message);

int lane();  // of the running thread, 0 .. 31
void* dynamic_shared();

enum class Vote { none, any, all, count };

// The barrier `id`: `threads` of them meet (0: all of the block). Returns the vote over `predicate`.
int barrier(int id, int threads, Vote vote, bool predicate, const char* what, Where where);

// The lanes of `mask` meet; memory accesses before it happen before those after it.
void sync_warp(unsigned mask, Where where = Where::current());

inline constexpr size_t kSlotBytes = 64;
void exchange_bytes(unsigned mask, const void* mine, void* all, size_t bytes, const char* what, Where where);

// The lanes of `mask` meet at the instruction `what`; returns what each of them brought.
template <typename T>
std::array<T, kWarp> exchange(unsigned mask, const T& mine, const char* what,
                              Where where = Where::current()) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= kSlotBytes);
  std::array<T, kWarp> all{};
  exchange_bytes(mask, &mine, all.data(), sizeof(T), what, where);
  return all;
}

// cp.async: `valid` of `bytes` bytes go from global to shared memory, the rest is zero. They arrive, and
// are poison until then, at the wait that leaves fewer younger groups than theirs.
void copy_async(void* shared, const void* global, int bytes, int valid);
void commit_async();
void wait_async(int groups_left);

}  // namespace emulator
