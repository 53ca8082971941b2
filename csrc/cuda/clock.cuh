// The device's clocks.
#pragma once

#include "launch.cuh"

#if !defined(__CUDACC__)
#include <simt_clock.h>
#endif

namespace sigma::cuda {

#if defined(__CUDACC__)
// Volatile and with a memory clobber, so that neither is moved past the work between two of them.
__device__ inline int64_t global_ns() {
  int64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)::"memory");
  return t;
}
__device__ inline int64_t cycles() {
  int64_t t;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(t)::"memory");
  return t;
}
__device__ inline int multiprocessor() {
  int id;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(id));
  return id;
}
#else
inline int64_t global_ns() { return simt::now_ns(); }
inline int64_t cycles() { return simt::now_ns(); }
inline int multiprocessor() { return 0; }
#endif

}  // namespace sigma::cuda
