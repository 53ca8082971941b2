#include "convert.h"

#include "dispatch.h"

namespace sigma::cpu {
namespace {

constexpr int64_t kSerialElements = 1 << 15;  // below this a parallel region costs more than it saves

}  // namespace

template <class T>
void widen(const Convert<T>& c) {
  const RowKernels<T>& rows = kernels();
#pragma omp parallel for schedule(static) num_threads(c.threads) if (c.rows * c.columns > kSerialElements)
  for (int64_t r = 0; r < c.rows; ++r)
    rows.widen(c.narrow + r * c.ld_narrow, c.wide + r * c.columns, c.columns);
}

template <class T>
void narrow(const Convert<T>& c) {
  const RowKernels<T>& rows = kernels();
#pragma omp parallel for schedule(static) num_threads(c.threads) if (c.rows * c.columns > kSerialElements)
  for (int64_t r = 0; r < c.rows; ++r)
    rows.narrow(c.wide + r * c.columns, c.narrow + r * c.ld_narrow, c.columns);
}

template void widen(const Convert<Bf16>&);
template void widen(const Convert<F16>&);
template void narrow(const Convert<Bf16>&);
template void narrow(const Convert<F16>&);

}  // namespace sigma::cpu
