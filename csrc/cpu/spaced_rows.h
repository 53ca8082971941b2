// Rows of x that lie whole pages apart, moved a line apart.  Where they lie they share a set of the first
// cache with the rows of W beside them and those that are asked for, which is more than a set holds: x @ W.T
// took 1.09 of the time on one thread, 1.06 on two (Zen 3, 21 rows an expert, K = 1,024).
#pragma once

#include <algorithm>
#include <cstdint>

#include "rows.h"
#include "scratch.h"

namespace sigma::cpu {

// A thread's copy of one expert's rows, for the tasks that it does one after another.
template <class X>
class SpacedRows {
 public:
  // Of a Scratch, for each thread; none where rows of x stay where they are.
  static int64_t bytes(const Rows<const X>& x) { return is_paged(x.ld) ? kBytes : 0; }

  explicit SpacedRows(const Scratch& scratch) : copy_(reinterpret_cast<X*>(scratch.mine<float>())) {}

  // Rows r0..r1 of x, of which K elements are wanted; copied unless the last ones began at r0 too: within a
  // region x, K and the end of what begins at r0 are the same.  x itself where they are too few to pay or too
  // many to stay in the second cache.
  Rows<const X> of(const Rows<const X>& x, int64_t r0, int64_t r1, int64_t K) {
    const int64_t rows = r1 - r0;
    int64_t ld = K + kLine;
    if (is_paged(ld)) ld += kLine;
    if (!copy_ || rows < kFewest || rows * ld * kSize > kBytes) return x;
    if (first_ != r0)
      for (int64_t i = 0; i < rows; ++i) std::copy_n(x(r0 + i), K, copy_ + i * ld);
    first_ = r0;
    return {.base = copy_, .ld = ld, .first = r0};
  }

 private:
  static constexpr int64_t kSize = sizeof(X), kLine = 64 / kSize, kFewest = 4, kBytes = 256 << 10;
  static bool is_paged(int64_t ld) { return ld * kSize % 4096 == 0; }

  X* copy_;
  int64_t first_ = -1;
};

}  // namespace sigma::cpu
