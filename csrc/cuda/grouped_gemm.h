// One matrix product per expert on the tensor cores, over rows that lie in expert order.  bf16 and f16, sums
// in float; sm_80 and later.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sigma::cuda {

// A matrix whose rows are taken in a given order: row r lies at index[r] / divisor, or at r where there is no
// index. A negative index is a row of zeros, or one that is not written.
template <class T>
struct Rows {
  T* base;
  int64_t ld;
  const int32_t* index;
  int32_t divisor;
};

// y[r] = scale[slot_of_row[r]] * x[r] * W[e] for the rows r of each expert e.
template <class T>
struct GroupedGemm {
  int64_t R;
  int E;
  int64_t N, K;
  const int32_t* offsets;  // [E+1]
  Rows<const T> x;         // [R, K]
  const T* w;              // [E, N, K] if it is transposed, [E, K, N] else
  int64_t w_expert, w_row;
  bool is_transposed;
  Rows<T> y;           // [R, N]
  const float* scale;  // or null
  const int32_t* slot_of_row;
};
template <class T>
cudaError_t grouped_gemm(const GroupedGemm<T>& g, cudaStream_t stream);

// out[e] (+)= a[rows of e]^T * b[rows of e], zero for an expert without rows unless it adds.
template <class T>
struct GroupedOuter {
  int E;
  int64_t A, B;
  const int32_t* offsets;
  Rows<const T> a;  // [R, A]
  Rows<const T> b;  // [R, B]
  T* out;           // [E, A, B]
  int64_t out_expert, out_row;
  bool adds;
};
template <class T>
cudaError_t grouped_outer(const GroupedOuter<T>& g, cudaStream_t stream);

}  // namespace sigma::cuda
