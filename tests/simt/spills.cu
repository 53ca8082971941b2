// For cubins.py to find: a block so large that a thread's sums don't fit its registers, and a load of 4
// bytes.
#include "cuda/launch.cuh"

__global__ void __launch_bounds__(1024, 2) spills(const float* x, float* y) {
  float sum[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) sum[i] = x[threadIdx.x * 65 + i * 1025];
  __syncthreads();
  for (int step = 1; step < 32; step *= 2)
#pragma unroll
    for (int i = 0; i < 64; ++i) sum[i] = sum[i] * sum[(i + 7) % 64] + sum[(i * 5 + 1) % 64];
#pragma unroll
  for (int i = 0; i < 64; ++i) y[threadIdx.x * 65 + i * 1025] = sum[i];
}
