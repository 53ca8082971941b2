// What the loops time: so many steps of one kind, the same in every quantum.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/grouped_gemm.h"

namespace sigma::noise {

// A step is one multiply-add of 64-bit integers that depends on the step before: no memory, no cache, no unit
// whose speed depends on values.  After n steps state is the n-th number of Knuth's generator (MMIX), which
// can be computed apart, so that no step can be missing.
struct Spin {
  int64_t steps;
  uint64_t state;

  void operator()() {
    uint64_t x = state;
    for (int64_t i = 0; i < steps; ++i) {
      x = x * 6364136223846793005u + 1442695040888963407u;
      asm volatile("" : "+r"(x));  // or a compiler may fold several steps into one
    }
    state = x;
  }
};

// A step copies one slice, the next step the next one, from the first again after the last.  Slices that are
// larger than the caches together measure memory.
struct Copy {
  int64_t steps;
  const char* from;  // [slices, slice]
  char* to;          // [slices, slice]
  int64_t slice;     // bytes
  int64_t slices;
  int64_t next = 0;

  void operator()() {
    for (int64_t i = 0; i < steps; ++i) {
      std::memcpy(to + next * slice, from + next * slice, slice);
      next = next + 1 < slices ? next + 1 : 0;
    }
  }
};

// A step is one grouped product of rows by weights.  Its schedule lists the experts that have rows in a few
// bytes of the heap: part of what a training step pays, and part of what is timed.
struct Product {
  int64_t steps;
  cpu::GroupedGemm<float> gemm;

  void operator()() const {
    for (int64_t i = 0; i < steps; ++i) cpu::grouped_gemm_nt(gemm);
  }
};

}  // namespace sigma::noise
