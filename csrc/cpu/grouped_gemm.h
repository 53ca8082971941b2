// One matrix product per expert, over rows that lie in expert order.
#pragma once

#include "isa/kernels.h"
#include "rows.h"

namespace sigma::cpu {

// y[r] = scale[r] * x[r] * W[e] for the rows r of each expert e.  M = rows of e.  W: float or Bf16.
template <class W = float>
struct GroupedGemm {
  int64_t E, N, K;
  const int32_t* offsets;   // [E+1]
  Rows<const float> x;      // [R, K]
  const W* w;               // [E, N, K], or [E, K, N] for grouped_gemm_nn
  int64_t w_expert, w_row;  // strides; the last dimension is contiguous
  Rows<float> y;            // [R, N]
  const float* scale;       // by slot, through slot_of_row, or null
  const int32_t* slot_of_row;
  int threads;
};

// w [E, N, K]: forward.
template <class W>
void grouped_gemm_nt(const GroupedGemm<W>& g);
// w [E, K, N]: gradient of x, and weights that lie transposed; no scale.
template <class W>
void grouped_gemm_nn(const GroupedGemm<W>& g);

// out[e] (+)= a[rows of e]^T * b[rows of e], zero for an expert without rows unless it adds.
template <class W = float>
struct GroupedOuter {
  int64_t E, A, B;
  const int32_t* offsets;
  Rows<const float> a;  // [R, A]
  Rows<const float> b;  // [R, B]
  W* out;               // [E, A, B]
  int64_t out_expert, out_row;
  bool adds;
  int threads;
};

template <class W>
void grouped_outer(const GroupedOuter<W>& g);

// Columns n0..n1 of one expert's rows r0..r1: what grouped_gemm_nt makes of a task, for schedules that fuse
// more.
template <class W>
void gemm_nt_columns(const Kernels& isa, const GroupedGemm<W>& g, int64_t e, int64_t r0, int64_t r1,
                     int64_t n0, int64_t n1);

}  // namespace sigma::cpu
