// A function with a stack of its own, which runs when it is resumed until it yields.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

class Fiber {
 public:
  // `body` runs again and again; it yields at least once each time.
  explicit Fiber(void (*body)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void resume();        // from outside of any fiber
  static void yield();  // from inside, back to whoever resumed it

 private:
  static void enter();

  void (*body_)();
  char* stack_;
#if defined(__x86_64__)
  void* top_;  // of the saved stack
#else
  ucontext_t context_;
#endif
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

}  // namespace simt
