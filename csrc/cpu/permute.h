// Rows into expert order and back.
#pragma once

#include <cstdint>

#include "isa/kernels.h"
#include "rows.h"

namespace sigma::cpu {

// out[r] = x[row_map[r] / k], of any type: sizes in bytes.
struct Permute {
  int64_t R, row_bytes;
  int k;
  const char* x;
  int64_t ldx_bytes;
  const int32_t* row_map;
  char* out;  // [R] rows, contiguous
  int threads;
};
void permute(const Permute& p);

// out[t] = sum_j weights[t, j] * y[row_of_slot[t*k + j]], summed in float and rounded once; null weights are
// all one, null row_of_slot is the identity, a negative row adds nothing.  <float, float>, <float, Bf16> and
// <Bf16, Bf16>.
template <class Y = float, class O = Y>
struct Combine {
  int64_t T, H;
  int k;
  const Y* y;
  int64_t ldy;
  const int32_t* row_of_slot;
  const float* weights;
  O* out;  // [T, H] contiguous
  int threads;
};
template <class Y, class O>
void combine(const Combine<Y, O>& c);

// The gradient of combine: grad_y[row] = w * grad_out[t], grad_weights[slot] = <grad_out[t], y[row]>.
template <class Y = float>
struct CombineBackward {
  int64_t R, H;
  int k;
  const Y *grad_out, *y;
  int64_t ld_grad, ldy;
  const int32_t* row_map;
  const float* weights;  // [T, k]
  Y* grad_y;             // [R, H] contiguous, or null
  float* grad_weights;   // [T, k], or null
  int threads;
};
template <class Y>
void combine_backward(const CombineBackward<Y>& c);

// row_of_slot[row_map[r]] = r
void invert(const int32_t* row_map, int64_t R, int32_t* row_of_slot);

}  // namespace sigma::cpu
