// Rows into expert order and back.  Bound: copy bandwidth; every row is read once and written once.
#include "permute.h"

#include "dispatch.h"

namespace sigma::cpu {
namespace {
constexpr int64_t kSerialFloats = 1 << 15;
}

void permute(const Permute& p) {
  const Kernels& isa = kernels();
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.R * p.H > kSerialFloats)
  for (int64_t r = 0; r < p.R; ++r) isa.copy_row(p.x + p.row_map[r] / p.k * p.ldx, p.out + r * p.H, p.H);
}

void combine(const Combine& c) {
  const Kernels& isa = kernels();
#pragma omp parallel for schedule(static) num_threads(c.threads) if (c.T * c.H * c.k > kSerialFloats)
  for (int64_t t = 0; t < c.T; ++t) {
    float* out = c.out + t * c.H;
    for (int j = 0; j < c.k; ++j) {
      const int64_t s = t * c.k + j;
      const float* y = c.y + (c.row_of_slot ? c.row_of_slot[s] : s) * c.ldy;
      const float weight = c.weights ? c.weights[s] : 1.0f;
      j == 0 ? isa.scale_row(y, weight, out, c.H) : isa.add_scaled_row(y, weight, out, c.H);
    }
  }
}

void combine_backward(const CombineBackward& c) {
  const Kernels& isa = kernels();
#pragma omp parallel for schedule(static) num_threads(c.threads) if (c.R * c.H > kSerialFloats)
  for (int64_t r = 0; r < c.R; ++r) {
    const int32_t s = c.row_map[r];
    const float* grad_out = c.grad_out + s / c.k * c.ld_grad;
    if (c.grad_y) isa.scale_row(grad_out, c.weights[s], c.grad_y + r * c.H, c.H);
    if (c.grad_weights) c.grad_weights[s] = isa.dot_row(grad_out, c.y + r * c.ldy, c.H);
  }
}

void invert(const int32_t* row_map, int64_t R, int32_t* row_of_slot) {
  for (int64_t r = 0; r < R; ++r) row_of_slot[row_map[r]] = static_cast<int32_t>(r);
}

}  // namespace sigma::cpu
