// Whole rows: copied, scaled, added, multiplied.  Bound: bytes.
#pragma once

#include "vec.h"

namespace sigma::SK_NS {

inline void copy_row(const float* x, float* y, int64_t n) {
  memcpy(y, x, static_cast<size_t>(n) * sizeof(float));
}

inline void widen_row(const Bf16* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i));
  if (i < n) store_partial(y + i, load_partial(x + i, n - i), n - i);
}

inline void narrow_row(const float* x, Bf16* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i));
  if (i < n) store_partial(y + i, load_partial(x + i, n - i), n - i);
}

inline void scale_row(const float* x, float factor, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i) * factor);
  if (i < n) store_partial(y + i, load_partial(x + i, n - i) * factor, n - i);
}

inline void add_scaled_row(const float* x, float factor, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(y + i) + load(x + i) * factor);
  if (i < n) store_partial(y + i, load_partial(y + i, n - i) + load_partial(x + i, n - i) * factor, n - i);
}

inline float dot_row(const float* x, const float* y, int64_t n) {
  Vec sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load(x + i) * load(y + i);
  if (i < n) sum += load_partial(x + i, n - i) * load_partial(y + i, n - i);
  return add_lanes(sum);
}

}  // namespace sigma::SK_NS
