// Whole rows: scaled, added, multiplied.  Bound: bytes.
#pragma once

#include "vec.h"

namespace sigma::SK_NS {

template <class T>
void widen_row(const T* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i));
  if (i < n) store_partial(y + i, load_partial(x + i, n - i), n - i);
}

template <class T>
void narrow_row(const float* x, T* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i));
  if (i < n) store_partial(y + i, load_partial(x + i, n - i), n - i);
}

inline void pair_rows(const Bf16* even, const Bf16* odd, Pair* y, int64_t n) {
  const auto pair = [&](int64_t i, auto bits)
                        SK_STEP { return interleave(bits(even + i), odd ? bits(odd + i) : HalfVec{}); };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(y + i, pair(i, [](const Bf16* p) SK_STEP { return load_bits(p); }));
  if (i < n)
    store_partial(y + i, pair(i, [l = n - i](const Bf16* p) SK_STEP { return load_bits_partial(p, l); }),
                  n - i);
}

template <class T, class Y>
void scale_row(const T* x, float factor, Y* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_sum(y + i, load(x + i) * factor);
  if (i < n) store_partial(y + i, load_partial(x + i, n - i) * factor, n - i);
}

template <class T>
void add_scaled_row(const T* x, float factor, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(y + i) + load(x + i) * factor);
  if (i < n) store_partial(y + i, load_partial(y + i, n - i) + load_partial(x + i, n - i) * factor, n - i);
}

// Eight sums side by side: one would wait for each addition, and be a chain of n / kLanes roundings.
template <class T>
float dot_row(const T* x, const T* y, int64_t n) {
  constexpr int kSums = 8;
  Vec sum[kSums]{};
  int64_t i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes)
#pragma GCC unroll 8
    for (int s = 0; s < kSums; ++s) sum[s] += load(x + i + s * kLanes) * load(y + i + s * kLanes);
  for (; i + kLanes <= n; i += kLanes) sum[0] += load(x + i) * load(y + i);
  if (i < n) sum[1] += load_partial(x + i, n - i) * load_partial(y + i, n - i);
#pragma GCC unroll 3
  for (int half = kSums / 2; half > 0; half /= 2)
#pragma GCC unroll 4
    for (int s = 0; s < half; ++s) sum[s] += sum[s + half];
  return add_lanes(sum[0]);
}

}  // namespace sigma::SK_NS
