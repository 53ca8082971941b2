// One matrix product per expert, over rows that lie in expert order.
#pragma once

#include "isa/kernels.h"
#include "rows.h"

namespace sigma::cpu {

// y[r] = scale[r] * x[r] * W[e] for the rows r of each expert e.  M = rows of e.
struct GroupedGemm {
  int64_t E, N, K;
  const int32_t* offsets;   // [E+1]
  Rows<const float> x;      // [R, K]
  const float* w;           // [E, N, K], or [E, K, N] for grouped_gemm_nn
  int64_t w_expert, w_row;  // strides; the last dimension is contiguous
  Rows<float> y;            // [R, N]
  const float* scale;       // by slot, through slot_of_row, or null
  const int32_t* slot_of_row;
  int threads;
};

void grouped_gemm_nt(const GroupedGemm& g);  // W [E, N, K]: forward
void grouped_gemm_nn(
    const GroupedGemm& g);  // W [E, K, N]: gradient of x, and weights that lie transposed; no scale

// out[e] (+)= a[rows of e]^T * b[rows of e], zero for an expert without rows unless it adds.
struct GroupedOuter {
  int64_t E, A, B;
  const int32_t* offsets;
  Rows<const float> a;  // [R, A]
  Rows<const float> b;  // [R, B]
  float* out;           // [E, A, B]
  int64_t out_expert, out_row;
  bool adds;
  int threads;
};

void grouped_outer(const GroupedOuter& g);

// Columns n0..n1 of one expert's rows r0..r1: what grouped_gemm_nt makes of a task, for schedules that fuse
// more.
void gemm_nt_columns(const Kernels& isa, const GroupedGemm& g, int64_t e, int64_t r0, int64_t r1, int64_t n0,
                     int64_t n1);

}  // namespace sigma::cpu
