// All that the emulator of tests/simt asks of a source: kernels are launched by SK_LAUNCH, and dynamic shared
// memory is named by SK_DYN_SMEM.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define SK_LAUNCH(kernel, grid, block, smem, stream, ...) \
  kernel<<<(grid), (block), (smem), (stream)>>>(__VA_ARGS__)
#define SK_DYN_SMEM(T, name)                                       \
  extern __shared__ __align__(16) unsigned char sk_dynamic_smem[]; \
  T* const name = reinterpret_cast<T*>(sk_dynamic_smem)
#else
#define SK_LAUNCH(kernel, grid, block, smem, stream, ...) \
  simt::launch(kernel, (grid), (block), (smem), (stream), __VA_ARGS__)
#define SK_DYN_SMEM(T, name) T* const name = static_cast<T*>(simt::dynamic_smem())
#endif

namespace sigma::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFF;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kMaxGridY = 65535;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

__device__ inline int lane() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ inline int warp() { return static_cast<int>(threadIdx.x / kWarp); }

// Over all lanes of a warp, in an order that is the same for all: same bits in each.
__device__ inline float warp_sum(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
__device__ inline float warp_max(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}
__device__ inline int32_t warp_inclusive_sum(int32_t x) {
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t below = __shfl_up_sync(kAllLanes, x, step);
    if (lane() >= step) x += below;
  }
  return x;
}

inline bool is_aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace sigma::cuda
