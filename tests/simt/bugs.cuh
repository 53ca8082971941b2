// Kernels with one bug each, and the same without it.
#pragma once

#include "cuda/tensor_core.cuh"

namespace bugs {

using namespace sigma::cuda;

template <bool kHasBarrier>
__global__ void reverse(const float* x, float* y, int n) {
  SK_DYN_SMEM(float, row);
  row[threadIdx.x] = x[threadIdx.x];
  if (kHasBarrier) __syncthreads();
  y[threadIdx.x] = row[n - 1 - threadIdx.x];
}

__global__ void beyond_dynamic(int at) {
  SK_DYN_SMEM(int, local);
  local[threadIdx.x] = 0;
  if (threadIdx.x == 0) local[at] = 1;
}

__global__ void beyond_static(int at, int* out) {
  __shared__ int local[8];
  int* volatile hidden = local;  // from UBSan, which knows the object behind a plain pointer
  int* const p = hidden;
  p[at] = 1;
  *out = p[0];
}

__global__ void beyond_global(float* x, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i <= n) x[i] = 1.0f;  // < is meant
}

__global__ void load_vector(const float* x, float* y) {
  *reinterpret_cast<float4*>(y) = *reinterpret_cast<const float4*>(x);
}

__global__ void half_a_warp_votes(int* out) {
  if (threadIdx.x % 32 < 16) *out = __any_sync(0xFFFFFFFF, 1);
}

__global__ void barrier_in_a_branch(int* out) {
  if (threadIdx.x % 32 < 16)
    __syncthreads();
  else
    *out = __any_sync(0xFFFFFFFF, 1);
}

__global__ void different_operations(int* out) {
  if (threadIdx.x < 16)
    __syncwarp();
  else
    *out = __any_sync(0xFFFFFFFF, 1);
}

__global__ void wrong_mask(int* out) { *out = __any_sync(1, 1); }

__global__ void reads_beyond_mask(int* out) {
  if (threadIdx.x < 16) *out = __shfl_sync(0xFFFF, static_cast<int>(threadIdx.x), 20);
}

__global__ void sum_in_any_order(const float* x, float* sum) { atomicAdd(sum, x[threadIdx.x]); }

__global__ void last_block_wins(int* out) { *out = static_cast<int>(blockIdx.x); }

template <bool kWaits>
__global__ void copy_and_read(const uint4* x, uint4* y) {
  SK_DYN_SMEM(uint4, local);
  copy_async(&local[threadIdx.x], &x[threadIdx.x], 16);
  commit_copies();
  if (kWaits) wait_for_copies<0>();
  __syncthreads();
  y[threadIdx.x] = local[blockDim.x - 1 - threadIdx.x];
}

__global__ void misaligned_copy(const unsigned char* x) {
  SK_DYN_SMEM(unsigned char, local);
  copy_async(local, x + 8, 16);
}

}  // namespace bugs
