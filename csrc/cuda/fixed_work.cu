// A round ends for a block when it has ended for all its threads: barriers stand before and after each.
#include "clock.cuh"
#include "fixed_work.h"

namespace sigma::cuda {
namespace {

constexpr int kChains = 4, kLinks = 8;  // 4 chains hide the latency of a fused multiply-add, 4 cycles

template <class Work>
__device__ void timed_rounds(int64_t rounds, Stamp* stamps, Work work) {
  for (int64_t round = 0; round < rounds; ++round) {
    __syncthreads();
    const int64_t begin_ns = global_ns(), begin = cycles();
    work();
    __syncthreads();
    const int64_t end = cycles(), end_ns = global_ns();
    if (threadIdx.x == 0)
      stamps[blockIdx.x * rounds + round] = {begin_ns, end_ns, end - begin, multiprocessor()};
  }
}

__global__ void __launch_bounds__(kWorkThreads) arithmetic_kernel(Arithmetic a) {
  float sum[kChains];
  for (int c = 0; c < kChains; ++c) sum[c] = 0.5f + 0.001f * static_cast<float>(threadIdx.x + c);
  timed_rounds(a.rounds, a.stamps, [&] {
    for (int64_t step = 0; step < a.steps; ++step)
#pragma unroll
      for (int link = 0; link < kLinks; ++link)
#pragma unroll
        for (int c = 0; c < kChains; ++c) sum[c] = fmaf(sum[c], 0.9999f, 0.0001f);  // tends to 1
  });
  a.sums[int64_t{blockIdx.x} * kWorkThreads + threadIdx.x] = sum[0] + sum[1] + sum[2] + sum[3];
}

__global__ void __launch_bounds__(kWorkThreads) copying_kernel(Copying c) {
  const uint4* const from = c.from + blockIdx.x * c.slice;
  uint4* const to = c.to + blockIdx.x * c.slice;
  timed_rounds(c.rounds, c.stamps, [&] {
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < c.slice; i += kWorkThreads) to[i] = from[i];
  });
}

}  // namespace

cudaError_t run_arithmetic(const Arithmetic& a, cudaStream_t stream) {
  if (a.blocks == 0) return cudaSuccess;
  SK_LAUNCH(arithmetic_kernel, a.blocks, kWorkThreads, 0, stream, a);
  return cudaGetLastError();
}

cudaError_t run_copying(const Copying& c, cudaStream_t stream) {
  if (c.blocks == 0) return cudaSuccess;
  SK_LAUNCH(copying_kernel, c.blocks, kWorkThreads, 0, stream, c);
  return cudaGetLastError();
}

}  // namespace sigma::cuda
