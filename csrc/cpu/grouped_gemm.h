// One matrix product per expert, over rows that lie in expert order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "isa/kernels.h"
#include "rows.h"

namespace sigma::cpu {

// y[r] = scale[r] * x[r] * W[e] for the rows r of each expert e.  M = rows of e.
// X, W, Y: how x, the weights and y are stored; the arithmetic is that of X (isa/kernels.h).  There are
// <float, float, float>, <float, Bf16, float>, <Bf16, Bf16, Bf16> and <Bf16, Bf16, float>.
template <class X = float, class W = X, class Y = X>
struct GroupedGemm {
  int64_t E, N, K;
  const int32_t* offsets;   // [E+1]
  Rows<const X> x;          // [R, K]
  const W* w;               // [E, N, K], or [E, K, N] for grouped_gemm_nn
  int64_t w_expert, w_row;  // strides; the last dimension is contiguous
  Rows<Y> y;                // [R, N]
  const float* scale;       // by slot, through slot_of_row, or null
  const int32_t* slot_of_row;
  int threads;
  const float* column_scale =
      nullptr;  // [E, N], a factor on each output channel, or null; grouped_gemm_nt alone
};

// w [E, N, K]: forward.
template <class X, class W, class Y>
void grouped_gemm_nt(const GroupedGemm<X, W, Y>& g);
// w [E, K, N]: gradient of x, and weights that lie transposed; no scale.
template <class X, class W, class Y>
void grouped_gemm_nn(const GroupedGemm<X, W, Y>& g);

// out[e] (+)= a[rows of e]^T * b[rows of e], zero for an expert without rows unless it adds.
// W: Bf16 or F16 beside X = float, float beside any.
template <class X = float, class W = X>
struct GroupedOuter {
  int64_t E, A, B;
  const int32_t* offsets;
  Rows<const X> a;  // [R, A]
  Rows<const X> b;  // [R, B]
  W* out;           // [E, A, B]
  int64_t out_expert, out_row;
  bool adds;
  int threads;
};

template <class X, class W>
void grouped_outer(const GroupedOuter<X, W>& g);

template <class W>
constexpr int64_t kLine = 64 / sizeof(W);  // elements in a cache line

// Of `lines` for a call of so many steps: what Ahead::a_step must be for all to be asked for.
inline int asked_a_step(int64_t lines, int64_t steps) {
  return static_cast<int>(ceil_div(lines * kAheadStep, std::max<int64_t>(steps, 1)));
}

// Below 1e5 FLOPs a parallel region costs more than it saves.
inline bool is_serial(int threads, double flops) { return threads == 1 || flops < 1e5; }

// Pieces of these, for schedules that fuse more.
constexpr int64_t kRowChunk = 128;  // rows of x that stay in L2 while the columns pass

// Columns n0..n1, 64 at most, of one expert's rows r0..r1: what grouped_gemm_nt makes of a task.
// `next`: the rows of weights that this thread will probably want afterwards, or null.
template <class X, class W, class Y>
void gemm_nt_columns(const Kernels& isa, const GroupedGemm<X, W, Y>& g, int64_t e, int64_t r0, int64_t r1,
                     int64_t n0, int64_t n1, const W* next);

constexpr int64_t kColumnBlock =
    64;  // of a forward task, at most: 64 * K weights stay in L2 across row chunks

// What a forward pass is cut into: columns of one expert that has rows.  Narrow ones where there are few, so
// that threads end together; a thread takes neighbours, so that it knows what comes next, where there are
// many.
struct ColumnTasks {
  struct Task {
    int64_t expert, begin, end;
    bool continues;  // the same thread most probably goes on at `end`
  };

  // Of N columns an expert.
  ColumnTasks(int64_t E, const int32_t* offsets, int64_t N, int threads);
  Task operator[](int64_t i) const {
    const int64_t begin = i % blocks * width;
    return {busy[i / blocks], begin, std::min(columns, begin + width),
            at_once > 1 && begin + width < columns};
  }

  std::vector<int32_t> busy;
  int64_t columns, width, blocks, count;
  int at_once;
};

// Columns n0..n1 of one expert's rows r0..r1, at most kRowChunk of them, for grouped_gemm_nn; y begins at
// column n0.
template <class X, class W, class Y>
void gemm_nn_columns(const Kernels& isa, const GroupedGemm<X, W, Y>& g, int64_t e, int64_t r0, int64_t r1,
                     int64_t n0, int64_t n1, Rows<float> y);

}  // namespace sigma::cpu
