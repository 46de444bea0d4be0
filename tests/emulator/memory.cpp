#include "memory.h"

#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include "block.h"

namespace emulator {
namespace {

struct Range {
  const char *begin, *end;
  bool holds(const void* address, size_t bytes = 1) const {
    const char* a = static_cast<const char*>(address);
    return begin <= a && a + bytes <= end;
  }
};

// One byte of shared memory.
struct Byte {
  uint64_t block = 0;  // what follows holds in this block; in another one nobody has touched the byte
  bool written = false, in_flight = false, by_atomic = false;
  Stamp writer, readers[2];  // the last reads that are not known to be over, of two threads
};

// Shared memory: the dynamic part, and the static arrays of kernels. `__shared__` is `static` here, and a
// kernel touches no other writable data of this module.
struct Shared {
  Range dynamic{}, statics{};
  std::vector<Byte> dynamic_bytes, static_bytes;
  uint64_t block = 0;
  size_t statics_used = 0;
} shared;

std::vector<Allowed*> allowed;
Range constants;
std::string module_path;
uintptr_t module_base;

int find_segments(dl_phdr_info* info, size_t, void*) {
  const char* base = reinterpret_cast<const char*>(info->dlpi_addr);
  Range writable{}, fixed{};
  bool ours = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& h = info->dlpi_phdr[i];
    if (h.p_type != PT_LOAD) continue;
    const Range segment{base + h.p_vaddr, base + h.p_vaddr + h.p_memsz};
    ours |= segment.holds(&shared);
    Range& kind = h.p_flags & PF_W ? writable : fixed;
    kind = {kind.begin ? std::min(kind.begin, segment.begin) : segment.begin,
            std::max(kind.end, segment.end)};
  }
  if (!ours) return 0;
  shared.statics = writable, constants = fixed;
  module_path = info->dlpi_name, module_base = info->dlpi_addr;
  return 1;
}

// "file.cu:12", with the callers of inlined functions behind it, for an address in the module.
std::string locate(const void* code) {
  char command[512], line[256];
  const uintptr_t offset = reinterpret_cast<uintptr_t>(code) - module_base - 1;
  std::snprintf(command, sizeof command, "addr2line -s -i -e '%s' 0x%zx", module_path.c_str(),
                size_t(offset));
  std::string places;
  if (FILE* pipe = popen(command, "r")) {
    while (std::fgets(line, sizeof line, pipe)) {
      std::string place = line;
      place = place.substr(0, place.find_first_of(" \n"));
      if (place.find("??") == std::string::npos) places += (places.empty() ? "" : " < ") + place;
    }
    pclose(pipe);
  }
  return places.empty() ? "an unknown line" : places;
}

const char* verb(Access access) {
  return access == Access::read ? "reads" : access == Access::write ? "writes" : "changes atomically";
}

[[noreturn]] void refuse(const std::string& problem, const void* code) {
  fail(problem + ", at " + locate(code));
}

[[noreturn]] void race(const char* mine, const char* theirs, int other, const void* code) {
  refuse(std::string("race: ") + mine + " shared memory that thread " + thread_name(other) + " " + theirs +
             ", with no barrier between",
         code);
}

Byte* shadow_of(const char* address) {
  Byte* byte = shared.dynamic.holds(address)   ? &shared.dynamic_bytes[address - shared.dynamic.begin]
               : shared.statics.holds(address) ? &shared.static_bytes[address - shared.statics.begin]
                                               : nullptr;
  if (byte && byte->block != shared.block) {
    *byte = Byte{.block = shared.block};
    if (shared.statics.holds(address)) ++shared.statics_used;
  }
  return byte;
}

void read_byte(Byte& b, const void* code) {
  if (b.in_flight)
    refuse("reads shared memory while a cp.async to it is in flight: wait for its group first", code);
  if (!b.written) refuse("reads shared memory that no thread has written", code);
  if (!happened_before(b.writer)) race("reads", "has written", b.writer.thread, code);
  const bool first = b.readers[0].thread < 0 || happened_before(b.readers[0]);
  b.readers[first ? 0 : 1] = now();
}

void write_byte(Byte& b, Access access, const void* code) {
  const bool atomics = access == Access::atomic && b.by_atomic;
  if (b.in_flight) refuse("writes shared memory while a cp.async to it is in flight", code);
  if (access == Access::atomic && !b.written)
    refuse("changes shared memory that no thread has written", code);
  if (b.written && !atomics && !happened_before(b.writer))
    race("writes", "has written", b.writer.thread, code);
  for (const Stamp& r : b.readers)
    if (r.thread >= 0 && !happened_before(r)) race("writes", "has read", r.thread, code);
  b = Byte{.block = shared.block, .written = true, .by_atomic = access == Access::atomic, .writer = now()};
}

// Whether [address, address + bytes) is shared memory; then every byte of it is checked.
bool check_shared(const void* address, size_t bytes, Access access, const void* code) {
  const char* a = static_cast<const char*>(address);
  if (!shadow_of(a) || !shadow_of(a + bytes - 1)) return false;
  for (size_t i = 0; i < bytes; ++i) {
    Byte& b = *shadow_of(a + i);
    access == Access::read ? read_byte(b, code) : write_byte(b, access, code);
  }
  if (shared.statics_used > kMaxStaticShared)
    refuse("the block uses more than " + std::to_string(kMaxStaticShared) + " bytes of static shared memory",
           code);
  return true;
}

// "4 bytes, 4 past the end of tensor 0, f32[2, 5] cpu": by the nearest tensor.
std::string describe(const char* a, size_t bytes) {
  std::string text = std::to_string(bytes) + " bytes outside of every tensor of the call";
  ptrdiff_t nearest = 4096;
  for (const Allowed* m : allowed) {
    const ptrdiff_t past = a + bytes - m->end(), before = m->begin() - a;
    const ptrdiff_t distance = std::max<ptrdiff_t>({past, before, 0});
    if (distance >= nearest) continue;
    nearest = distance;
    const std::string place = past > 0     ? std::to_string(distance) + " past the end of "
                              : before > 0 ? std::to_string(distance) + " before the beginning of "
                                           : "in the gaps between the rows of ";
    text = std::to_string(bytes) + " bytes, " + place + m->traffic.name;
  }
  return text;
}

}  // namespace

Allowed::Allowed(const void* begin, size_t element, const std::vector<Axis>& axes, std::string name)
    : traffic{std::move(name), {}, {}},
      begin_(static_cast<const char*>(begin)),
      extent_(element),
      run_(element),
      axes_(axes) {
  std::ranges::sort(axes_, std::greater{}, &Axis::stride);
  for (const Axis& a : axes_)
    if (a.count == 0) extent_ = run_ = 0;
  if (run_ == 0) axes_.clear();
  for (const Axis& a : axes_) extent_ += (a.count - 1) * a.stride;
  while (!axes_.empty() && (axes_.back().stride <= run_ || axes_.back().count == 1)) {
    run_ += (axes_.back().count - 1) * axes_.back().stride;
    axes_.pop_back();
  }
  allowed.push_back(this);
}
Allowed::~Allowed() { std::erase(allowed, this); }

bool Allowed::holds(const void* address, size_t bytes) const {
  const char* a = static_cast<const char*>(address);
  if (a < begin_ || a >= end()) return false;
  size_t offset = a - begin_;
  for (const Axis& axis : axes_) offset -= std::min(offset / axis.stride, axis.count - 1) * axis.stride;
  return offset + bytes <= run_;
}

void Traffic::count(const void* address, size_t bytes, Access access) {
  size_t width = bytes;
  if (bytes > 16 || bytes & (bytes - 1)) {
    const size_t bits = reinterpret_cast<uintptr_t>(address) | bytes | 16;
    width = bits & -bits;
  }
  if (access != Access::write) reads[width] += bytes / width;
  if (access != Access::read) writes[width] += bytes / width;
}

void check_access_by(const void* address, size_t bytes, Access access, const void* code) {
  if (on_own_stack(address)) return;
  const Range own{reinterpret_cast<const char*>(&self), reinterpret_cast<const char*>(&self + 1)};
  if (own.holds(address, bytes)) return;
  for (Allowed* m : allowed)
    if (m->holds(address, bytes)) return m->traffic.count(address, bytes, access);
  if (check_shared(address, bytes, access, code)) return;
  if (access == Access::read && constants.holds(address, bytes)) return;
  refuse(std::string(verb(access)) + " " + describe(static_cast<const char*>(address), bytes), code);
}

void begin_block(char* dynamic, size_t dynamic_bytes) {
  if (!shared.statics.begin) {
    dl_iterate_phdr(find_segments, nullptr);
    shared.static_bytes.resize(shared.statics.end - shared.statics.begin);
    shared.dynamic_bytes.resize(kMaxDynamicShared);
  }
  ++shared.block;
  shared.statics_used = 0;
  shared.dynamic = {dynamic, dynamic + dynamic_bytes};
}

void begin_copy(const void* address, size_t bytes, const void* code) {
  if (!check_shared(address, bytes, Access::write, code))
    refuse("cp.async to memory that is not shared", code);
  for (size_t i = 0; i < bytes; ++i) shadow_of(static_cast<const char*>(address) + i)->in_flight = true;
}

void end_copy(const void* address, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    Byte& b = *shadow_of(static_cast<const char*>(address) + i);
    b.in_flight = false, b.writer = now();
  }
}

}  // namespace emulator

// What the compiler calls before every load and store: the interface of GCC's thread sanitizer. (Its address
// sanitizer leaves out a store that follows a load of the same address.)
#define RFK_HOOK __attribute__((visibility("hidden"))) void
#define RFK_HOOKS(size)                                                                    \
  RFK_HOOK __tsan_read##size(void* p) {                                                    \
    emulator::check_access(p, size, emulator::Access::read, __builtin_return_address(0));  \
  }                                                                                        \
  RFK_HOOK __tsan_write##size(void* p) {                                                   \
    emulator::check_access(p, size, emulator::Access::write, __builtin_return_address(0)); \
  }
extern "C" {
RFK_HOOKS(1)
RFK_HOOKS(2)
RFK_HOOKS(4)
RFK_HOOKS(8)
RFK_HOOKS(16)
RFK_HOOK __tsan_read_range(void* p, size_t n) {
  emulator::check_access(p, n, emulator::Access::read, __builtin_return_address(0));
}
RFK_HOOK __tsan_write_range(void* p, size_t n) {
  emulator::check_access(p, n, emulator::Access::write, __builtin_return_address(0));
}
RFK_HOOK __tsan_vptr_update(void*, void*) {}
RFK_HOOK __tsan_func_entry(void*) {}
RFK_HOOK __tsan_func_exit() {}
RFK_HOOK __tsan_init() {}
}
