// A matrix whose rows are taken in a given order: row r lies at index[r] / divisor, or at r - first.
#pragma once

#include <cstdint>

namespace sigma::cpu {

template <class T>
struct Rows {
  T* base = nullptr;
  int64_t ld = 0;
  const int32_t* index = nullptr;  // null: rows as they lie
  int32_t divisor = 1;             // k, where the index is a slot and the row a token
  int64_t first = 0;               // the row at base, where rows lie in order

  T* operator()(int64_t r) const { return base + (index ? index[r] / divisor : r - first) * ld; }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The i-th of `parts` nearly equal pieces of 0..n starts here.
constexpr int64_t piece(int64_t n, int64_t parts, int64_t i) { return n * i / parts; }

}  // namespace sigma::cpu
