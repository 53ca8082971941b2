// Whole rows: gathered, scattered, and summed with weights.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sigma::cuda {

// out[out_index[r]] = x[x_index[r] / x_divisor], of any type: sizes and strides in bytes.  A null index is r;
// a row with a negative one is left out.
struct CopyRows {
  int64_t R, row_bytes;
  const char* x;
  int64_t ldx;
  const int32_t* x_index;
  int x_divisor;
  char* out;
  int64_t ld_out;
  const int32_t* out_index;
};
cudaError_t copy_rows(const CopyRows& c, cudaStream_t stream);

// row_of_slot[row_map[r]] = r
cudaError_t invert(const int32_t* row_map, int64_t R, int32_t* row_of_slot, cudaStream_t stream);

// out[t] = sum_j weights[t, j] * y[row_of_slot[t*k + j]], summed in float in the order of j and rounded once.
// Null weights are all one, a null row_of_slot is the identity, a negative row adds nothing. float, Bf16 and
// F16.
template <class T>
struct Combine {
  int64_t tokens, H;
  int k;
  const T* y;
  int64_t ldy;
  const int32_t* row_of_slot;
  const float* weights;  // [T, k]
  T* out;
  int64_t ld_out;
};
template <class T>
cudaError_t combine(const Combine<T>& c, cudaStream_t stream);

// The gradient of combine: grad_y[r] = w * grad_out[t], grad_weights[slot] = <grad_out[t], y[r]>.
template <class T>
struct CombineBackward {
  int64_t R, H;
  int k;
  const T* grad_out;
  int64_t ld_grad;
  const T* y;
  int64_t ldy;
  const int32_t* row_map;
  const float* weights;  // [T, k]
  T* grad_y;             // [R, H] contiguous, or null
  float* grad_weights;   // [T, k], or null
};
template <class T>
cudaError_t combine_backward(const CombineBackward<T>& c, cudaStream_t stream);

}  // namespace sigma::cuda
