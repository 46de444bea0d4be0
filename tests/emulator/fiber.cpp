#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#ifndef __x86_64__
#error "the emulator switches stacks on x86-64 only: add emulator_switch for this machine"
#endif

// void emulator_switch(void** save, void* load): keeps the registers that a call must preserve on the
// running stack, notes its pointer in *save, and returns on the stack `load` (System V ABI).
extern "C" void emulator_switch(void** save, void* load);
__asm__(R"(
  .text
  .globl emulator_switch
  .hidden emulator_switch
  .type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size emulator_switch, .-emulator_switch

  # Where a new fiber begins: rbx holds the fiber, r12 the function that takes it.
  .globl emulator_begin
  .hidden emulator_begin
  .type emulator_begin, @function
emulator_begin:
  movq %rbx, %rdi
  call *%r12
  ud2
  .size emulator_begin, .-emulator_begin
)");
extern "C" void emulator_begin();

namespace emulator {

Fiber::Fiber() {
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<char*>(memory);
  mprotect(stack_, kGuardBytes, PROT_NONE);  // a stack that grows too long faults
}

Fiber::~Fiber() { munmap(stack_, kStackBytes); }

void Fiber::enter(Fiber* self) {
  self->body_(self->arg_);
  self->ended_ = true;
  self->pause();
}

bool Fiber::start(void (*body)(void*), void* arg) {
  body_ = body, arg_ = arg, ended_ = false;
  // What emulator_switch pops, from the top down: the address that it returns to, rbp, rbx, r12 .. r15.
  auto* top = reinterpret_cast<uintptr_t*>(stack_ + kStackBytes);
  *--top = reinterpret_cast<uintptr_t>(&emulator_begin);
  *--top = 0;
  *--top = reinterpret_cast<uintptr_t>(this);
  *--top = reinterpret_cast<uintptr_t>(&Fiber::enter);
  for (int i = 0; i < 3; ++i) *--top = 0;
  inside_ = top;
  return resume();
}

bool Fiber::resume() {
  emulator_switch(&outside_, inside_);
  return ended_;
}

void Fiber::pause() { emulator_switch(&inside_, outside_); }

}  // namespace emulator
