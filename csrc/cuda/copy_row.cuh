// One row copied by a warp, in the widest units that the addresses allow.
#pragma once

#include "launch.cuh"

namespace sigma::cuda {

template <class Unit>
__device__ void copy_row(const char* x, char* out, int64_t bytes) {
  const auto* const from = reinterpret_cast<const Unit*>(x);
  auto* const to = reinterpret_cast<Unit*>(out);
  const int64_t units = bytes / static_cast<int64_t>(sizeof(Unit));
  int64_t i = lane();
  for (; i + 3 * kWarp < units; i += 4 * kWarp) {  // four loads under way a lane
    Unit part[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) part[j] = from[i + j * kWarp];
#pragma unroll
    for (int j = 0; j < 4; ++j) to[i + j * kWarp] = part[j];
  }
  for (; i < units; i += kWarp) to[i] = from[i];
  const int64_t b = units * static_cast<int64_t>(sizeof(Unit)) + lane();
  if (b < bytes) out[b] = x[b];
}

// f<Unit>() for the widest unit in which both sides' rows begin.
template <class F>
void with_unit(const char* x, int64_t ldx, const char* out, int64_t ld_out, F f) {
  const auto fits = [&](int64_t bytes) {
    return is_aligned(x, bytes) && is_aligned(out, bytes) && ldx % bytes == 0 && ld_out % bytes == 0;
  };
  if (fits(16)) return f.template operator()<uint4>();
  if (fits(4)) return f.template operator()<uint32_t>();
  if (fits(2)) return f.template operator()<uint16_t>();
  f.template operator()<uint8_t>();
}

}  // namespace sigma::cuda
