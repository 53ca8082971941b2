// The instructions that CUDA C++ has no function for.  Their meaning in plain C++ is in the emulator of
// tests/simt.
#pragma once

#include "launch.cuh"
#include "number.cuh"

#if !defined(__CUDACC__)
#include <simt_tensor_core.h>
#endif

namespace sigma::cuda {

// c += a b, a [16][16] and b [16][8] in 16 bits, c [16][8] in float, spread over a warp.
template <class T>
__device__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#if defined(__CUDACC__)

#define SK_MMA(T, type)                                                                                   \
  template <>                                                                                             \
  __device__ __forceinline__ void mma<T>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                   \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                             \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                     \
  }
SK_MMA(Bf16, "bf16")
SK_MMA(F16, "f16")
#undef SK_MMA

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four matrices [8][8] of 16 bits from shared memory; lane 8i + r names row r of matrix i.
__device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes into shared memory, of which `bytes` are read and the rest are zero.
__device__ inline void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of the groups committed last are under way.
template <int N>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

#else

template <>
inline void mma<Bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma<simt::bf16_to_float>("mma bf16", c, a, b);
}
template <>
inline void mma<F16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::mma<simt::half_to_float>("mma f16", c, a, b);
}
inline void load_matrices(uint32_t (&out)[4], const void* row) {
  simt::load_matrices("ldmatrix", out, row, false);
}
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  simt::load_matrices("ldmatrix.trans", out, row, true);
}
inline void copy_async(void* to, const void* from, int bytes) { simt::copy_async(to, from, bytes); }
inline void commit_copies() { simt::copies().commit(); }
template <int N>
void wait_for_copies() {
  simt::copies().wait(N);
}

#endif

}  // namespace sigma::cuda
