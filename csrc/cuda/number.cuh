// Stored numbers to float and back, to the nearest even; and vectors of them that are loaded at once.
#pragma once

#include "launch.cuh"
#include "number.h"

#if !defined(__CUDACC__)
#include <simt_tensor_core.h>
#endif

namespace sigma::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}

#if defined(__CUDACC__)
__device__ inline float to_float(F16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
template <>
__device__ inline Bf16 from_float<Bf16>(float x) {
  Bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <>
__device__ inline F16 from_float<F16>(float x) {
  F16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
#else
inline float to_float(F16 x) { return simt::half_to_float(x.bits); }
template <>
inline Bf16 from_float<Bf16>(float x) {
  return {simt::float_to_bf16(x)};
}
template <>
inline F16 from_float<F16>(float x) {
  return {simt::float_to_half(x)};
}
#endif

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T x[N];
};
template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements of the widest load

template <class T>
bool has_vectors(const T* x, int64_t ld) {
  return is_aligned(x, 16) && ld % kVector<T> == 0;  // null, where there is no such operand, is aligned
}

// f<n>(column) for what a lane has of a row of H, n = V at once and then one by one.
template <int V, class F>
__device__ void each_part(int64_t H, F f) {
  for (int64_t c = int64_t{lane()} * V; c + V <= H; c += kWarp * V) f.template operator()<V>(c);
  if (V > 1 && H / V * V + lane() < H) f.template operator()<1>(H / V * V + lane());
}

}  // namespace sigma::cuda
