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

template <class T>
float dot_row(const T* x, const T* y, int64_t n) {
  Vec sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load(x + i) * load(y + i);
  if (i < n) sum += load_partial(x + i, n - i) * load_partial(y + i, n - i);
  return add_lanes(sum);
}

}  // namespace sigma::SK_NS
