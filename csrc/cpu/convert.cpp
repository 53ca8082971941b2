#include "convert.h"

#include <algorithm>

#include "dispatch.h"
#include "rows.h"

namespace sigma::cpu {
namespace {

constexpr int64_t kSerialElements = 1 << 15;  // below this a parallel region costs more than it saves
constexpr int64_t kPiece = 4096;

// run(wide, narrow, n) over all elements: by rows, or in pieces where the rows lie one after the other, since
// a row may be one element.
template <class T, class F>
void over_elements(const Convert<T>& c, F run) {
  const int64_t all = c.rows * c.columns;
  const bool is_flat = c.ld_narrow == c.columns;
  const int64_t step = is_flat ? kPiece : c.columns, steps = is_flat ? ceil_div(all, kPiece) : c.rows;
#pragma omp parallel for schedule(static) num_threads(c.threads) if (all > kSerialElements)
  for (int64_t i = 0; i < steps; ++i)
    run(c.wide + i * step, c.narrow + i * (is_flat ? step : c.ld_narrow), std::min(step, all - i * step));
}

}  // namespace

template <class T>
void widen(const Convert<T>& c) {
  const RowKernels<T>& rows = kernels();
  over_elements(c, [&](float* wide, const T* narrow, int64_t n) { rows.widen(narrow, wide, n); });
}

template <class T>
void narrow(const Convert<T>& c) {
  const RowKernels<T>& rows = kernels();
  over_elements(c, [&](const float* wide, T* narrow, int64_t n) { rows.narrow(wide, narrow, n); });
}

template void widen(const Convert<Bf16>&);
template void widen(const Convert<F16>&);
template void narrow(const Convert<Bf16>&);
template void narrow(const Convert<F16>&);

}  // namespace sigma::cpu
