#pragma once

#include <cstddef>

// Threads of execution that take turns on one OS thread, each with a stack of its own.

namespace emulator {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // From outside: begins body(arg) from the top, whatever was on the stack before, and returns when
  // the body has returned (true) or called `pause` (false).
  bool start(void (*body)(void*), void* arg);
  // From outside: goes on after the `pause`; returns as `start` does.
  bool resume();
  // From the body: back to whoever called `start` or `resume`.
  void pause();

  bool owns(const void* address) const { return stack_ <= address && address < stack_ + kStackBytes; }

 private:
  static constexpr size_t kStackBytes = 128 << 10, kGuardBytes = 4096;
  static void enter(Fiber* self);

  char* stack_;
  void* inside_ = nullptr;   // saved stack pointer of the body
  void* outside_ = nullptr;  // and of whoever runs it
  void (*body_)(void*) = nullptr;
  void* arg_ = nullptr;
  bool ended_ = false;
};

}  // namespace emulator
