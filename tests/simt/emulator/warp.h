// Warp intrinsics as meetings, atomics, and the device functions that kernels use.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "block.h"

namespace simt {

// What a lane has in its register when it reads from another lane.
template <class T>
T lane_value(const char* what, Meeting& m, int lane) {
  if (!(m.mask >> lane & 1)) fail("%s: mask %08x lacks lane %d, which is read", what, m.mask, lane);
  return m.of<T>(lane);
}

template <class T, class Op>
T reduced(const char* what, uint32_t mask, T x, Op op) {
  return meet(what, mask, x, [&](Meeting& m) {
    int i = std::countr_zero(mask);
    T out = m.of<T>(i);
    for (++i; i < kWarpSize; ++i)
      if (mask >> i & 1) out = op(out, m.of<T>(i));
    return out;
  });
}

template <class T>
uint32_t lanes_where(Meeting& m, T value) {
  uint32_t out = 0;
  for (int i = 0; i < kWarpSize; ++i)
    if (m.mask >> i & 1) out |= uint32_t{m.of<T>(i) == value} << i;
  return out;
}

// The first lane of the segment of `width` lanes that this one is in.
inline int segment(int width) { return lane_id() / width * width; }

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T x, int from, int width = 32) {
  return simt::meet("__shfl_sync", mask, x, [&](simt::Meeting& m) {
    return simt::lane_value<T>("__shfl_sync", m, simt::segment(width) + (from & (width - 1)));
  });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lanes, int width = 32) {
  return simt::meet("__shfl_xor_sync", mask, x, [&](simt::Meeting& m) {
    const int from = simt::lane_id() ^ lanes;
    return from >= simt::segment(width) + width ? x : simt::lane_value<T>("__shfl_xor_sync", m, from);
  });
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32) {
  return simt::meet("__shfl_up_sync", mask, x, [&](simt::Meeting& m) {
    const int from = simt::lane_id() - static_cast<int>(by);
    return from < simt::segment(width) ? x : simt::lane_value<T>("__shfl_up_sync", m, from);
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32) {
  return simt::meet("__shfl_down_sync", mask, x, [&](simt::Meeting& m) {
    const int from = simt::lane_id() + static_cast<int>(by);
    return from >= simt::segment(width) + width ? x : simt::lane_value<T>("__shfl_down_sync", m, from);
  });
}

inline unsigned __ballot_sync(unsigned mask, int vote) {
  return simt::meet("__ballot_sync", mask, vote != 0,
                    [](simt::Meeting& m) { return simt::lanes_where<bool>(m, true); });
}
inline int __any_sync(unsigned mask, int vote) {
  return simt::meet("__any_sync", mask, vote != 0,
                    [](simt::Meeting& m) { return int{simt::lanes_where<bool>(m, true) != 0}; });
}
inline int __all_sync(unsigned mask, int vote) {
  return simt::meet("__all_sync", mask, vote != 0,
                    [](simt::Meeting& m) { return int{simt::lanes_where<bool>(m, true) == m.mask}; });
}
template <class T>
unsigned __match_any_sync(unsigned mask, T x) {
  return simt::meet("__match_any_sync", mask, x,
                    [&](simt::Meeting& m) { return simt::lanes_where<T>(m, x); });
}
template <class T>
unsigned __match_all_sync(unsigned mask, T x, int* is_same) {
  const unsigned same =
      simt::meet("__match_all_sync", mask, x, [&](simt::Meeting& m) { return simt::lanes_where<T>(m, x); });
  *is_same = same == mask;
  return *is_same ? mask : 0;
}

template <class T>
T __reduce_add_sync(unsigned mask, T x) {
  return simt::reduced("__reduce_add_sync", mask, x, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T x) {
  return simt::reduced("__reduce_min_sync", mask, x, [](T a, T b) { return std::min(a, b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T x) {
  return simt::reduced("__reduce_max_sync", mask, x, [](T a, T b) { return std::max(a, b); });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned x) {
  return simt::reduced("__reduce_and_sync", mask, x, [](unsigned a, unsigned b) { return a & b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned x) {
  return simt::reduced("__reduce_or_sync", mask, x, [](unsigned a, unsigned b) { return a | b; });
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFF) {
  simt::leave(simt::arrive("__syncwarp", mask, nullptr, 0));
}
inline void __syncthreads() { simt::meet_block("__syncthreads", 0); }
inline int __syncthreads_or(int vote) { return simt::meet_block("__syncthreads_or", vote).any; }
inline int __syncthreads_and(int vote) { return simt::meet_block("__syncthreads_and", vote).all; }
inline int __syncthreads_count(int vote) { return simt::meet_block("__syncthreads_count", vote).count; }
inline void __threadfence() {}

namespace simt {
template <class T, class Op>
T atomic(T* place, Op op) {
  may_be_overtaken();
  const T before = *place;
  *place = op(before);
  return before;
}
}  // namespace simt

template <class T>
T atomicAdd(T* place, std::type_identity_t<T> x) {
  return simt::atomic(place, [x](T before) { return before + x; });
}
template <class T>
T atomicMax(T* place, std::type_identity_t<T> x) {
  return simt::atomic(place, [x](T before) { return std::max(before, x); });
}
template <class T>
T atomicMin(T* place, std::type_identity_t<T> x) {
  return simt::atomic(place, [x](T before) { return std::min(before, x); });
}
template <class T>
T atomicExch(T* place, std::type_identity_t<T> x) {
  return simt::atomic(place, [x](T) { return x; });
}
template <class T>
T atomicCAS(T* place, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
  return simt::atomic(place, [=](T before) { return before == expected ? x : before; });
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return std::abs(b) > 0x1p126f ? 0.0f : a / b; }
