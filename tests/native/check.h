// What the native tests share: numbers, how near a result must be, and the count of what passed.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <type_traits>
#include <vector>

#include "isa/kernels.h"

using sigma::Bf16;
using sigma::F16;
using sigma::Int8;
using Floats = std::vector<float>;

inline int passed = 0, failed = 0;
inline std::mt19937 generator(1);

inline Floats random_floats(int64_t n) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  Floats out(n);
  for (float& x : out) x = uniform(generator);
  return out;
}

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

#if defined(__aarch64__)
using Half = __fp16;  // GCC 12 has no _Float16 in C++ there
#else
using Half = _Float16;
#endif
inline float to_float(F16 x) { return static_cast<float>(std::bit_cast<Half>(x.bits)); }

inline void expect(const char* what, bool is_true) {
  is_true ? ++passed : ++failed;
  if (!is_true) std::printf("wrong: %s\n", what);
}

// Rounds x itself, so that what is checked against sees the same numbers.
template <class W>
std::vector<W> stored(Floats& x) {
  std::vector<W> out(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    if constexpr (std::is_same_v<W, Bf16>) {
      const uint32_t bits = std::bit_cast<uint32_t>(x[i]), low = bits & 0xFFFF;
      const bool goes_up = low > 0x8000 || (low == 0x8000 && (bits >> 16 & 1));
      out[i] = Bf16{static_cast<uint16_t>((bits >> 16) + goes_up)};
    } else if constexpr (std::is_same_v<W, F16>) {
      out[i] = F16{std::bit_cast<uint16_t>(static_cast<Half>(x[i]))};
    } else {
      out[i] = x[i];
    }
    x[i] = to_float(out[i]);
  }
  return out;
}

// `noise`: what operands that were rounded on the way add to a result's error, beside its own rounding.
template <class W>
void check(const char* what, const std::vector<W>& got, const std::vector<double>& want, double noise = 0) {
  // Half a unit of 8 or 11 bits of mantissa.
  const double rounding = std::is_same_v<W, Bf16> ? 1.0 / 256 : std::is_same_v<W, F16> ? 1.0 / 2048 : 0;
  double size = 0;
  for (const double w : want) size = std::max(size, std::abs(w));
  // Of what cancels in a deep contraction is left the error of its terms.
  const double least = 1e-4 * std::max(1.0, size);
  bool is_close = got.size() == want.size();
  for (size_t i = 0; is_close && i < want.size(); ++i)
    is_close =
        std::abs(to_float(got[i]) - want[i]) <= least + noise * size + (1e-4 + rounding) * std::abs(want[i]);
  is_close ? ++passed : ++failed;
  if (!is_close) std::printf("wrong: %s\n", what);
}

struct Case {
  int64_t T, H, I, E;
  int k;
};

// Sizes of experts that leave the first idle and crowd the last.
inline std::vector<int32_t> random_indices(const Case& c) {
  std::vector<int32_t> indices(c.T * c.k);
  for (int64_t s = 0; s < c.T * c.k; ++s)
    indices[s] = static_cast<int32_t>(c.E == 1 ? 0 : s % 3 == 0 ? c.E - 1 : 1 + generator() % (c.E - 1));
  return indices;
}

// Of test_rows.cpp: routing, permutation, conversion.
void test_rows(const Case& c, const std::vector<int32_t>& row_map);
void test_numbers_and_maps();
