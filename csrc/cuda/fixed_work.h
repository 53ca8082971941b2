// The same work again and again, each round of each block timed by the device: whatever its times differ by
// is noise of the device or of its neighbours, not of the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sigma::cuda {

constexpr int kWorkThreads = 256;  // of a block

struct Stamp {
  int64_t begin_ns, end_ns;  // of the device's global timer, whose step is 32 ns to 1 us
  int64_t cycles;            // of the multiprocessor's own clock
  int64_t multiprocessor;
};

// Each thread makes `steps` times 8 dependent fused multiply-adds on each of 4 chains: no memory is touched.
struct Arithmetic {
  int blocks;
  int64_t rounds, steps;
  Stamp* stamps;  // [blocks, rounds]
  float* sums;    // [blocks, kWorkThreads], so that the work has a result; the same in every run
};
cudaError_t run_arithmetic(const Arithmetic& a, cudaStream_t stream);

// Each block copies its own slice of 16-byte elements, slice after slice; larger than the caches together,
// the slices measure memory.
struct Copying {
  int blocks;
  int64_t rounds, slice;  // elements
  const uint4* from;      // [blocks, slice]
  uint4* to;              // [blocks, slice]
  Stamp* stamps;          // [blocks, rounds]
};
cudaError_t run_copying(const Copying& c, cudaStream_t stream);

}  // namespace sigma::cuda
