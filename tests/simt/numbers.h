// Stored numbers in tests.
#pragma once

#include <type_traits>
#include <vector>

#include "cuda/number.cuh"

namespace check {

using sigma::cuda::Bf16;
using sigma::cuda::F16;

template <class T>
float float_of(T x) {
  return sigma::cuda::to_float(x);
}

// Rounds x itself, so that what is checked against sees the same numbers.
template <class T>
std::vector<T> stored(std::vector<float>& x) {
  std::vector<T> out(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    out[i] = sigma::cuda::from_float<T>(x[i]);
    x[i] = float_of(out[i]);
  }
  return out;
}

template <class T>
T nan_of() {
  return sigma::cuda::from_float<T>(__builtin_nanf(""));
}

// Half a unit of 8 or 11 bits of mantissa.
template <class T>
constexpr double rounding() {
  return std::is_same_v<T, Bf16> ? 1.0 / 256 : std::is_same_v<T, F16> ? 1.0 / 2048 : 0;
}

}  // namespace check
