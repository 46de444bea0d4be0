#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

// The memory of an emulated kernel. The compiler reports every load and store of the .cu files
// (-fsanitize=thread, without its library), and this decides whether a device would have allowed it:
// global memory inside the tensors of the call, shared memory inside the block's, written before it is
// read, and ordered by a barrier against other threads.

namespace emulator {

enum class Access { read, write, atomic };

// The running thread accesses memory; an access that is not allowed does not return. Host code is not
// checked.
void check_access(const void* address, size_t bytes, Access access, const void* code);

// One axis of strided memory, in bytes.
struct Axis {
  size_t count, stride;
};

// What threads have asked of a tensor, request by request: number of accesses by their width in bytes. The
// caches of a device are not here, so a value that two threads read is counted twice. Atomics count on both
// sides. A structure that is copied whole is one access of its size; copies of more than 16 bytes and of
// unknown alignment (memcpy) are accesses of the widest type, 16 bytes at most, that size and address allow.
struct Traffic {
  std::string name;  // "tensor 0, f32[2, 5] cpu"
  std::map<size_t, uint64_t> reads, writes;
  void count(const void* address, size_t bytes, Access access);
};

// Global memory, while it lives: the elements of a tensor, none of the gaps between its rows. Memory that
// two tensors share counts for the first of them.
class Allowed {
 public:
  Allowed(const void* begin, size_t element, const std::vector<Axis>& axes, std::string name);
  ~Allowed();
  Allowed(const Allowed&) = delete;

  bool holds(const void* address, size_t bytes) const;  // the whole of it, without a gap
  const char* begin() const { return begin_; }
  const char* end() const { return begin_ + extent_; }

  Traffic traffic;

 private:
  const char* begin_;
  size_t extent_, run_;     // from the first byte to the last; of which this many are neighbours
  std::vector<Axis> axes_;  // between runs, the widest stride first
};

// --- for block.cpp ---

// Who accesses shared memory, and when: a warp's clock counts its synchronisations.
struct Stamp {
  int thread = -1;
  uint32_t clock = 0;
};
void check_access_by(const void* address, size_t bytes, Access access,
                     const void* code);  // the running thread
Stamp now();                             // of the running thread
bool happened_before(Stamp stamp);       // is ordered before the running thread by barriers
std::string thread_name(int thread);

void begin_block(char* dynamic, size_t dynamic_bytes);                // poisons all shared memory
void begin_copy(const void* shared, size_t bytes, const void* code);  // cp.async in flight
void end_copy(const void* shared, size_t bytes);                      // and arrived
bool on_own_stack(const void* address);

}  // namespace emulator
