#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

// The memory of an emulated kernel. The compiler reports every load and store of the .cu files
// (-fsanitize=thread, without its library), and this decides whether a device would have allowed it:
// global memory inside the tensors of the call, shared memory inside the block's, written before it is
// read, and ordered by a barrier against other threads.

namespace emulator {

enum class Access { read, write, atomic };

// The running thread accesses memory; an access that is not allowed does not return. Host code is not
// checked.
void check_access(const void* address, size_t bytes, Access access, const void* code);

// Global memory, while it lives; `name` is for messages: "out f32[2, 5]".
class Allowed {
 public:
  Allowed(const void* begin, size_t bytes, std::string name);
  ~Allowed();
  Allowed(const Allowed&) = delete;
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
