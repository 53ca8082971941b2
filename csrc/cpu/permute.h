// Rows into expert order and back.
#pragma once

#include <cstdint>

#include "rows.h"

namespace sigma::cpu {

// out[r] = x[row_map[r] / k]
struct Permute {
  int64_t R, H;
  int k;
  const float* x;
  int64_t ldx;
  const int32_t* row_map;
  float* out;  // [R, H] contiguous
  int threads;
};
void permute(const Permute& p);

// out[t] = sum_j weights[t, j] * y[row_of_slot[t*k + j]]; null weights are all one, null row_of_slot is the
// identity.
struct Combine {
  int64_t T, H;
  int k;
  const float* y;
  int64_t ldy;
  const int32_t* row_of_slot;
  const float* weights;
  float* out;  // [T, H] contiguous
  int threads;
};
void combine(const Combine& c);

// The gradient of combine: grad_y[row] = w * grad_out[t], grad_weights[slot] = <grad_out[t], y[row]>.
struct CombineBackward {
  int64_t R, H;
  int k;
  const float *grad_out, *y;
  int64_t ld_grad, ldy;
  const int32_t* row_map;
  const float* weights;  // [T, k]
  float* grad_y;         // [R, H] contiguous, or null
  float* grad_weights;   // [T, k], or null
  int threads;
};
void combine_backward(const CombineBackward& c);

// row_of_slot[row_map[r]] = r
void invert(const int32_t* row_map, int64_t R, int32_t* row_of_slot);

}  // namespace sigma::cpu
