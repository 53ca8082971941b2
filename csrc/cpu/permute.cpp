// Rows into expert order and back.  Bound: copy bandwidth; every row is read once and written once.
#include "permute.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "dispatch.h"

namespace sigma::cpu {
namespace {
constexpr int64_t kSerialBytes = 1 << 17;
constexpr int64_t kPiece = 1024;  // columns whose sums wait in L1 to be rounded
}  // namespace

void permute(const Permute& p) {
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.R * p.row_bytes > kSerialBytes)
  for (int64_t r = 0; r < p.R; ++r)
    std::memcpy(p.out + r * p.row_bytes, p.x + p.row_map[r] / p.k * p.ldx_bytes, p.row_bytes);
}

template <class Y, class O>
void combine(const Combine<Y, O>& c) {
  const RowKernels<Y>& rows = kernels();
  const auto row_of = [&](int64_t s) { return c.row_of_slot ? c.row_of_slot[s] : s; };
  const auto weight = [&](int64_t s) { return c.weights ? c.weights[s] : 1.0f; };
  const auto add_up = [&](int64_t t, int64_t h, int64_t columns, float* sum) {
    bool is_first = true;
    for (int64_t s = t * c.k; s < (t + 1) * c.k; ++s) {
      const int64_t row = row_of(s);
      if (row < 0) continue;
      (is_first ? rows.scale_wide : rows.add_scaled)(c.y + row * c.ldy + h, weight(s), sum, columns);
      is_first = false;
    }
    if (is_first) std::memset(sum, 0, columns * sizeof(float));
  };
#pragma omp parallel for schedule(static) num_threads(c.threads) if (c.T * c.H * c.k * 4 > kSerialBytes)
  for (int64_t t = 0; t < c.T; ++t) {
    O* const out = c.out + t * c.H;
    if constexpr (std::is_same_v<Y, O>) {
      if (c.k == 1) {
        const int64_t row = row_of(t);
        if (row < 0)
          std::memset(out, 0, c.H * sizeof(O));
        else
          rows.scale(c.y + row * c.ldy, weight(t), out, c.H);
        continue;
      }
    }
    if constexpr (std::is_same_v<O, float>) {
      add_up(t, 0, c.H, out);
    } else {
      const RowKernels<O>& to = kernels();
      float sum[kPiece];
      for (int64_t h = 0; h < c.H; h += kPiece) {
        const int64_t columns = std::min(kPiece, c.H - h);
        add_up(t, h, columns, sum);
        to.narrow(sum, out + h, columns);
      }
    }
  }
}

template <class Y>
void combine_backward(const CombineBackward<Y>& c) {
  const RowKernels<Y>& rows = kernels();
#pragma omp parallel for schedule(static) num_threads(c.threads) if (c.R * c.H * 4 > kSerialBytes)
  for (int64_t r = 0; r < c.R; ++r) {
    const int32_t s = c.row_map[r];
    const Y* grad_out = c.grad_out + s / c.k * c.ld_grad;
    if (c.grad_weights) c.grad_weights[s] = rows.dot(grad_out, c.y + r * c.ldy, c.H);
    if (!c.grad_y) continue;
    rows.scale(grad_out, c.weights[s], c.grad_y + r * c.H, c.H);
  }
}

template void combine(const Combine<float, float>&);
template void combine(const Combine<float, Bf16>&);
template void combine(const Combine<Bf16, Bf16>&);
template void combine(const Combine<F16, F16>&);
template void combine_backward(const CombineBackward<float>&);
template void combine_backward(const CombineBackward<Bf16>&);
template void combine_backward(const CombineBackward<F16>&);

void invert(const int32_t* row_map, int64_t R, int32_t* row_of_slot) {
  for (int64_t r = 0; r < R; ++r) row_of_slot[row_map[r]] = static_cast<int32_t>(r);
}

}  // namespace sigma::cpu
