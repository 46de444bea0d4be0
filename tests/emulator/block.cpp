#include "block.h"

#include <algorithm>
#include <cstdlib>
#include <list>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "fiber.h"
#include "memory.h"

namespace emulator {

Self self;

namespace {

struct Copy {
  void* shared;
  const void* global;
  int bytes, valid;
};

enum class State { ready, waits, done };

struct Thread {
  Dim index;
  State state = State::ready;
  std::unique_ptr<Fiber> fiber;  // from the first step to the last
  const char* what = "";         // it waits for this, there
  Where where;
  int vote = 0;            // of the last barrier
  std::vector<Copy> open;  // cp.async since the last commit
  std::list<std::vector<Copy>> groups;
};

// Lanes of a warp that meet at one instruction.
struct Meeting {
  unsigned mask, arrived = 0, left = 0;
  const char* what;
  std::array<std::array<std::byte, kSlotBytes>, kWarp> slots;
};

// What a warp knows of the past: an access stamped (thread, clock) is over for it if it has seen that clock.
struct Warp {
  std::list<Meeting> meetings;
  uint32_t now = 1;
  std::array<uint32_t, kWarp> seen{};                      // of the other warps of the block
  std::array<std::array<uint32_t, kWarp>, kWarp> lanes{};  // [lane][of another lane]
};

struct Barrier {
  int expected = 0, votes = 0;
  Where where;
  std::vector<int> members;
};

struct Block {
  const Launch& launch;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::array<Barrier, 16> barriers;
  int running = -1;  // index of a thread
  std::string error;
};

Block* block = nullptr;
bool kernel_code = false;  // a kernel's own code is running, no function of the emulator

// At the head of every function that kernels call: what the emulator itself reads and writes is its affair.
struct Enter {
  Enter() { kernel_code = false; }
  ~Enter() { kernel_code = true; }
};

std::mt19937_64 order;
std::vector<std::unique_ptr<Fiber>> spare;

Thread& me() { return block->threads[block->running]; }
Warp& my_warp() { return block->warps[block->running / kWarp]; }

std::string text(Dim d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

std::string text(const Where& w) {
  const std::string file = w.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(w.line());
}

std::string kernel_and_block() {
  return std::string("kernel ") + block->launch.what + ", block " + text(self.block_index);
}

// --- scheduling ---

void step(int index) {
  Thread& t = block->threads[index];
  block->running = index;
  self.thread_index = t.index;
  bool ended;
  if (t.fiber) {
    ended = t.fiber->resume();
  } else {
    if (spare.empty()) spare.push_back(std::make_unique<Fiber>());
    t.fiber = std::move(spare.back());
    spare.pop_back();
    kernel_code = true;
    ended = t.fiber->start(block->launch.thread, block->launch.arg);
  }
  kernel_code = false;
  block->running = -1;
  if (!ended) return;
  t.state = State::done;
  spare.push_back(std::move(t.fiber));
}

void wait(const char* what, Where where) {
  Thread& t = me();
  t.state = State::waits, t.what = what, t.where = where;
  t.fiber->pause();
}

// Who waits where: the first of them stands for all that wait at one place.
[[noreturn]] void report_deadlock() {
  struct Group {
    std::string first, place;
    int count;
  };
  std::vector<Group> groups;
  for (size_t i = 0; i < block->threads.size(); ++i) {
    const Thread& t = block->threads[i];
    const std::string place =
        t.state == State::done ? "returned" : std::string("waits at ") + t.what + ", " + text(t.where);
    const auto same = std::ranges::find(groups, place, &Group::place);
    if (same == groups.end())
      groups.push_back({thread_name(int(i)), place, 1});
    else
      ++same->count;
  }
  std::ostringstream os;
  os << kernel_and_block() << ": deadlock:";
  for (const Group& g : groups)
    os << " [" << g.count << " thread" << (g.count > 1 ? "s" : "") << ", first " << g.first << ": " << g.place
       << "]";
  throw std::runtime_error(os.str());
}

void run_block() {
  std::vector<int> ready;
  for (;;) {
    ready.clear();
    bool all_done = true;
    for (size_t i = 0; i < block->threads.size(); ++i) {
      const State s = block->threads[i].state;
      all_done &= s == State::done;
      if (s == State::ready && (ready.empty() || ready.back() != int(i) / kWarp))
        ready.push_back(int(i) / kWarp);
    }
    if (all_done) return;
    if (ready.empty()) report_deadlock();
    const int warp = ready[order() % ready.size()];
    const int end = std::min<int>((warp + 1) * kWarp, block->threads.size());
    for (int i = warp * kWarp; i < end; ++i) {
      if (block->threads[i].state != State::ready) continue;
      step(i);
      if (!block->error.empty()) throw std::runtime_error(block->error);
    }
  }
}

void check_limits(const Launch& l) {
  const auto require = [&](bool holds, const std::string& what) {
    if (!holds) throw std::runtime_error(std::string("kernel ") + l.what + ": " + what);
  };
  const uint64_t threads = uint64_t(l.block.x) * l.block.y * l.block.z;
  require(1 <= threads && threads <= 1024 && l.block.z <= 64,
          "a block must have 1 .. 1024 threads, z at most 64, got " + text(l.block));
  require(l.grid.x >= 1 && l.grid.y >= 1 && l.grid.z >= 1 && l.grid.x <= 0x7fffffffu && l.grid.y <= 65535 &&
              l.grid.z <= 65535,
          "a grid must have 1 .. 2^31 - 1, 65535, 65535 blocks, got " + text(l.grid));
  require(l.shared_bytes <= kMaxDynamicShared,
          "dynamic shared memory is at most " + std::to_string(kMaxDynamicShared) +
              " bytes on sm_86, 89 and 120, got " + std::to_string(l.shared_bytes));
}

void run_block_at(const Launch& launch, uint64_t number) {
  const Dim g = launch.grid, b = launch.block;
  self.block_index = {unsigned(number % g.x), unsigned(number / g.x % g.y), unsigned(number / g.x / g.y)};
  Block now{launch, std::vector<Thread>(size_t(b.x) * b.y * b.z), {}, {}, -1, {}};
  for (size_t i = 0; i < now.threads.size(); ++i)
    now.threads[i].index = {unsigned(i % b.x), unsigned(i / b.x % b.y), unsigned(i / b.x / b.y)};
  now.warps.resize((now.threads.size() + kWarp - 1) / kWarp);
  block = &now;
  const std::unique_ptr<void, void (*)(void*)> leave(&now, [](void*) { block = nullptr; });
  begin_block(static_cast<char*>(dynamic_shared()), launch.shared_bytes);
  run_block();
}

// --- clocks ---

void order_warps(const std::vector<int>& members) {
  std::vector<bool> in(block->warps.size());
  for (int t : members) in[t / kWarp] = true;
  std::array<uint32_t, kWarp> joined{};
  for (size_t w = 0; w < in.size(); ++w) {
    if (!in[w]) continue;
    const Warp& warp = block->warps[w];
    for (int v = 0; v < kWarp; ++v) joined[v] = std::max(joined[v], warp.seen[v]);
    joined[w] = warp.now;
  }
  for (size_t w = 0; w < in.size(); ++w) {
    if (!in[w]) continue;
    Warp& warp = block->warps[w];
    warp.seen = joined;
    for (auto& lane : warp.lanes) lane.fill(warp.now);
    ++warp.now;
  }
}

void order_lanes(Warp& warp, unsigned mask) {
  std::array<uint32_t, kWarp> joined{};
  for (int l = 0; l < kWarp; ++l)
    if (mask >> l & 1)
      for (int k = 0; k < kWarp; ++k)
        joined[k] = std::max(joined[k], mask >> k & 1 ? warp.now : warp.lanes[l][k]);
  for (int l = 0; l < kWarp; ++l)
    if (mask >> l & 1) warp.lanes[l] = joined;
  ++warp.now;
}

// --- meetings ---

Meeting& join(unsigned mask, const void* mine, size_t bytes, const char* what) {
  Warp& warp = my_warp();
  const int first = block->running / kWarp * kWarp;
  const int size = std::min<int>(kWarp, block->threads.size() - first);
  if (!(mask >> lane() & 1)) fail(std::string(what) + ": the mask leaves out the lane that calls");
  if (size < kWarp && mask >> size)
    fail(std::string(what) + ": the mask names lanes that the warp does not have");
  auto m = std::ranges::find_if(warp.meetings,
                                [&](const Meeting& x) { return x.mask == mask && x.arrived != mask; });
  if (m == warp.meetings.end()) m = warp.meetings.insert(m, Meeting{mask, 0, 0, what, {}});
  if (std::strcmp(m->what, what) != 0)
    fail(std::string("lanes of one warp meet at different instructions: ") + what + " and " + m->what);
  if (bytes) std::memcpy(m->slots[lane()].data(), mine, bytes);
  m->arrived |= 1u << lane();
  return *m;
}

void meet(Meeting& m, Where where) {
  if (m.arrived != m.mask) return wait(m.what, where);
  const int first = block->running / kWarp * kWarp;
  for (int l = 0; l < kWarp; ++l)
    if (m.mask >> l & 1) block->threads[first + l].state = State::ready;
}

void leave(Meeting& m) {
  m.left |= 1u << lane();
  if (m.left == m.mask) my_warp().meetings.remove_if([&](const Meeting& x) { return &x == &m; });
}

}  // namespace

void run(const Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  check_limits(launch);
  self.grid_dim = launch.grid, self.block_dim = launch.block;
  const Allowed parameters(launch.arg, launch.arg_bytes, {}, "the kernel's parameters");
  std::vector<uint64_t> blocks(uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), order);
  for (uint64_t number : blocks) run_block_at(launch, number);
}

void set_seed(uint64_t seed) { order.seed(seed); }

void fail(const std::string& message) {
  kernel_code = false;
  block->error = kernel_and_block() + ", thread " + thread_name(block->running) + ": " + message;
  me().fiber->pause();
  std::abort();  // nobody resumes a thread that has failed
}

int lane() { return block->running % kWarp; }

void* dynamic_shared() {  // on the heap, so that an access past its end is in no segment of the module
  static void* const memory = std::aligned_alloc(1024, kMaxDynamicShared);
  return memory;
}

int barrier(int id, int threads, Vote vote, bool predicate, const char* what, Where where) {
  const Enter enter;
  const int size = int(block->threads.size());
  if (id < 0 || id > 15) fail(std::string(what) + ": a barrier must be 0 .. 15, got " + std::to_string(id));
  if (threads < 0 || threads > size || threads % kWarp)
    fail(std::string(what) + ": threads must be whole warps of the block, got " + std::to_string(threads));
  Barrier& b = block->barriers[id];
  const int expected = threads ? threads : size;
  if (b.members.empty()) b.expected = expected, b.votes = 0, b.where = where;
  if (b.expected != expected)
    fail(std::string(what) + ": the threads at one barrier expect different numbers");
  if (threads == 0 && text(b.where) != text(where))
    fail("divergent barrier: this thread is at " + text(where) + ", others wait at " + text(b.where));
  b.votes += predicate;
  b.members.push_back(block->running);
  if (int(b.members.size()) < expected) {
    wait(what, where);
  } else {
    order_warps(b.members);
    const int result = vote == Vote::any ? b.votes > 0 : vote == Vote::all ? b.votes == expected : b.votes;
    for (int member : b.members) {
      block->threads[member].vote = result;
      block->threads[member].state = State::ready;
    }
    b.members.clear();
  }
  return me().vote;
}

void sync_warp(unsigned mask, Where where) {
  const Enter enter;
  Meeting& m = join(mask, nullptr, 0, "__syncwarp");
  if (m.arrived == m.mask) order_lanes(my_warp(), mask);
  meet(m, where);
  leave(m);
}

void exchange_bytes(unsigned mask, const void* mine, void* all, size_t bytes, const char* what, Where where) {
  const Enter enter;
  Meeting& m = join(mask, mine, bytes, what);
  meet(m, where);
  for (int l = 0; l < kWarp; ++l)
    if (mask >> l & 1) std::memcpy(static_cast<char*>(all) + l * bytes, m.slots[l].data(), bytes);
  leave(m);
}

void copy_async(void* shared, const void* global, int bytes, int valid) {
  const Enter enter;
  const void* code = __builtin_return_address(0);
  if (reinterpret_cast<uintptr_t>(shared) % bytes || reinterpret_cast<uintptr_t>(global) % bytes)
    fail("cp.async: both addresses must be multiples of " + std::to_string(bytes));
  if (valid) check_access_by(global, valid, Access::read, code);
  begin_copy(shared, bytes, code);
  me().open.push_back({shared, global, bytes, valid});
}

void commit_async() {
  const Enter enter;
  me().groups.push_back(std::move(me().open));
  me().open.clear();
}

void wait_async(int groups_left) {
  const Enter enter;
  for (auto& groups = me().groups; int(groups.size()) > groups_left; groups.pop_front())
    for (const Copy& c : groups.front()) {
      std::memset(c.shared, 0, c.bytes);
      std::memcpy(c.shared, c.global, c.valid);
      end_copy(c.shared, c.bytes);
    }
}

// --- for memory.cpp ---

bool on_own_stack(const void* address) { return me().fiber->owns(address); }

Stamp now() { return {block->running, my_warp().now}; }

bool happened_before(Stamp s) {
  if (s.thread == block->running) return true;
  const int warp = s.thread / kWarp;
  if (warp == block->running / kWarp) return my_warp().lanes[lane()][s.thread % kWarp] >= s.clock;
  return my_warp().seen[warp] >= s.clock;
}

void check_access(const void* address, size_t bytes, Access access, const void* code) {
  if (!kernel_code) return;
  const Enter enter;
  check_access_by(address, bytes, access, code);
}

std::string thread_name(int thread) { return text(block->threads[thread].index); }

}  // namespace emulator
