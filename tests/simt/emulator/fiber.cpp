// Switching of stacks.  swapcontext changes the signal mask with a system call each time, 327 ns measured;
// the ten instructions below take a few.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

constexpr size_t kGuard = 4096, kStack = 128 << 10;

Fiber* running = nullptr;
#if defined(__x86_64__)
void* outside;
#else
ucontext_t outside;
#endif
void* outside_fake_stack = nullptr;
const void* outside_stack = nullptr;
size_t outside_size = 0;

#if defined(__SANITIZE_ADDRESS__)
void start_switch(void** fake, const void* stack, size_t size) {
  __sanitizer_start_switch_fiber(fake, stack, size);
}
void finish_switch(void* fake, const void** stack, size_t* size) {
  __sanitizer_finish_switch_fiber(fake, stack, size);
}
#else
void start_switch(void**, const void*, size_t) {}
void finish_switch(void*, const void**, size_t*) {}
#endif

}  // namespace

#if defined(__x86_64__)
extern "C" void simt_switch(void** saved, void* next);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
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
.size simt_switch, .-simt_switch
)");
#endif

Fiber::Fiber(void (*body)()) : body_(body) {
  void* const map = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED || mprotect(map, kGuard, PROT_NONE) != 0) {
    std::perror("simt: stack of a fiber");
    std::abort();
  }
  stack_ = static_cast<char*>(map) + kGuard;
#if defined(__x86_64__)
  auto* top = reinterpret_cast<uint64_t*>(stack_ + kStack);
  *--top = 0;  // where enter would return to; also leaves the stack as the ABI wants it after a call
  *--top = reinterpret_cast<uint64_t>(&Fiber::enter);
  for (int i = 0; i < 6; ++i) *--top = 0;
  top_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStack;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::enter, 0);
#endif
}

Fiber::~Fiber() { munmap(stack_ - kGuard, kGuard + kStack); }

void Fiber::enter() {
  finish_switch(nullptr, &outside_stack, &outside_size);
  for (;;) running->body_();
}

void Fiber::resume() {
  running = this;
  start_switch(&outside_fake_stack, stack_, kStack);
#if defined(__x86_64__)
  simt_switch(&outside, top_);
#else
  swapcontext(&outside, &context_);
#endif
  finish_switch(outside_fake_stack, nullptr, nullptr);
}

void Fiber::yield() {
  Fiber* const self = running;
  start_switch(&self->fake_stack_, outside_stack, outside_size);
#if defined(__x86_64__)
  simt_switch(&self->top_, outside);
#else
  swapcontext(&self->context_, &outside);
#endif
  finish_switch(self->fake_stack_, &outside_stack, &outside_size);
}

}  // namespace simt
