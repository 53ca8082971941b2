#include "convert.h"

#include "dispatch.h"

namespace sigma::cpu {
namespace {

constexpr int64_t kSerialElements = 1 << 15;  // below this a parallel region costs more than it saves

}  // namespace

void widen(const Convert& c) {
  const Kernels& isa = kernels();
#pragma omp parallel for schedule(static) num_threads(c.threads) if (c.rows * c.columns > kSerialElements)
  for (int64_t r = 0; r < c.rows; ++r)
    isa.widen_row(c.narrow + r * c.ld_narrow, c.wide + r * c.columns, c.columns);
}

void narrow(const Convert& c) {
  const Kernels& isa = kernels();
#pragma omp parallel for schedule(static) num_threads(c.threads) if (c.rows * c.columns > kSerialElements)
  for (int64_t r = 0; r < c.rows; ++r)
    isa.narrow_row(c.wide + r * c.columns, c.narrow + r * c.ld_narrow, c.columns);
}

}  // namespace sigma::cpu
