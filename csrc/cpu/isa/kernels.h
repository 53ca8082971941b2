// The contract between schedules and micro-kernels: one table of functions per instruction set.
#pragma once

#include <stdint.h>

namespace sigma {

constexpr int kMaxBlockRows = 8, kMaxDotCols = 8;

// bfloat16 as it is stored: the upper half of a float.
struct Bf16 {
  uint16_t bits;
};

// IEEE half precision as it is stored, and an integer that stands for itself times a factor of its output
// channel.
struct F16 {
  uint16_t bits;
};
struct Int8 {
  int8_t value;
};

// Two bf16 that follow each other along a contraction, the earlier in the low half: what processors with bf16
// products multiply and sum in one instruction.
struct Pair {
  uint32_t bits;
};

// The two arithmetics.  With float operands (A = float) weights, stored as W, are widened in registers.  With
// bf16 operands (A = Bf16) both sides are bf16, taken two at a time along the contraction.  Sums are float in
// both.
template <class A>
struct PackedAs;
template <>
struct PackedAs<float> {
  using type = float;
  static constexpr int64_t kStep = 1;
};
template <>
struct PackedAs<Bf16> {
  using type = Pair;
  static constexpr int64_t kStep = 2;
};
template <class A>
using Packed = typename PackedAs<A>::type;  // an element of a packed panel
template <class A>
constexpr int64_t kStep = PackedAs<A>::kStep;  // of the contraction, by one packed element

// How an output block reaches memory.
enum class Store { kWrite, kAdd, kStream };

// Lines of memory that come later, for the cache: `count` of them, in runs of `run` lines `stride` bytes
// apart; runs are `next` bytes apart.  Asked for evenly, `a_step` of them every kAheadStep steps of the
// contraction.
struct Ahead {
  const char* at = nullptr;
  int64_t stride = 0, next = 0;
  int run = 0, count = 0, a_step = 0;
};
constexpr int kAheadStep = 4;

// A block of rows of A times rows of B, both contiguous along the contraction.
template <class A, class W>
struct DotBlock {
  const A* const* a;  // rows of A
  const W* b;         // rows of B, ldb apart
  int64_t ldb;
  float* const* c;  // rows of C, whose column `column` is written first
  int64_t column;
  const float* scale;  // a factor for each row of C, or null
  int64_t K;
  Store mode;
  Ahead ahead = {};
};

// A block of products of packed panels: c[m][n] (+)= sum_s a[s][m] * b[s][n].
template <class A, class C>
struct PanelBlock {
  const Packed<A>* a;  // [steps, panel_rows]
  const Packed<A>* b;  // [steps, panel]
  C* const* c;         // rows of C, whose column `column` is written first
  int64_t column;
  int64_t steps;
  int64_t columns;  // 1 .. panel
  Store mode;
  Ahead ahead = {};
};

// Rows of B to panels [steps, panel], one after another, the last filled up with zeros.
template <class A, class W>
struct PackBlock {
  const W* b;  // [K rows, ldb apart]
  int64_t ldb;
  int64_t K, columns;
  Packed<A>* panels;
};

// What balance losses read of one token's scores: q, its probabilities, and the log of its logits' sum of
// exps.
struct RouteSums {
  bool is_softmax;       // q = softmax(logits); else sigmoids divided by their sum
  float* probabilities;  // [E], q is added; null: no sums are wanted
  float* q;              // scratch [E]
};

struct RouteRow {
  const float* logits;
  const float* bias;  // [E] or null
  int64_t E;
  int k;
  bool is_softmax;
  bool is_normalized;
  float* p;          // scratch [E], only where there is a bias
  int32_t* indices;  // [k]
  float* weights;    // [k]
  RouteSums sums;
};

struct RouteRowBackward {
  const float* logits;
  int64_t E;
  int k;
  bool is_softmax;
  bool is_normalized;
  const int32_t* indices;
  const float* grad_weights;
  float* grad_logits;               // [E]
  bool sums_softmax;                // as in RouteSums
  const float* grad_probabilities;  // [E]; null: the sums were not asked for
  float grad_square;                // of the sum over tokens of the square of the log
  float* q;                         // scratch [E], where there is a grad_probabilities
};

// The families of micro-kernels by their operands.  Each entry is for as many rows of the block, and in dot
// also for as many columns, as its place says.
template <class A, class W>
struct DotKernels {
  void (*dot[kMaxBlockRows + 1][kMaxDotCols + 1])(const DotBlock<A, W>&);
};
template <class A, class C>
struct PanelKernels {
  void (*panel_product[kMaxBlockRows + 1])(const PanelBlock<A, C>&);
};
template <class A, class W>
struct PackKernels {
  void (*pack)(const PackBlock<A, W>&);
};

// Whole rows, stored as T, summed as floats.
template <class T>
struct RowKernels {
  void (*scale)(const T* x, float factor, T* y, int64_t n);           // y = factor * x
  void (*scale_wide)(const T* x, float factor, float* y, int64_t n);  // the same, not rounded
  void (*add_scaled)(const T* x, float factor, float* y, int64_t n);  // y += factor * x
  float (*dot)(const T* x, const T* y, int64_t n);
  void (*widen)(const T* x, float* y, int64_t n);
  void (*narrow)(const float* x, T* y, int64_t n);  // to the nearest, ties to even
};

// Operands and weights that each family has.
template <class A, class W>
struct GemmKernels : DotKernels<A, W>, PackKernels<A, W>, PanelKernels<A, W> {};

// What one instruction set runs; a family is taken by its name: `const DotKernels<A, W>& dots = isa`.
struct Kernels : GemmKernels<float, float>,
                 GemmKernels<float, Bf16>,
                 GemmKernels<float, F16>,
                 GemmKernels<Bf16, Bf16>,
                 PanelKernels<Bf16, float>,  // sums of many rows, rounded later
                 DotKernels<float, Int8>,    // forward only
                 RowKernels<float>,
                 RowKernels<Bf16>,
                 RowKernels<F16> {
  const char* name;
  int lanes;
  int dot_rows;                     // largest block of dot, in rows
  int dot_cols[kMaxBlockRows + 1];  // and in columns, by its rows
  int panel_rows, panel;            // largest block of panels: rows, and columns
  bool multiplies_bf16;             // in hardware: bf16 operands are faster than widened ones
  void (*pair_rows)(const Bf16* even, const Bf16* odd, Pair* y, int64_t n);  // odd may be null: zeros
  void (*swiglu)(const float* gate, const float* up, float* out, int64_t n);
  // Also returns sum_i grad_out[i] * out[i], the gradient of a factor on the row, and writes factor * out.
  float (*swiglu_backward)(const float* grad_out, const float* gate, const float* up, float factor,
                           float* grad_gate, float* grad_up, float* scaled_out, int64_t n);
  float (*route_row)(const RouteRow&);  // the log of the sum of exps, where sums are wanted
  void (*route_row_backward)(const RouteRowBackward&);
};

namespace base {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
namespace avx512bf16 {
const Kernels& kernels();
}
namespace lowered16 {  // the tests' alone: 16 lanes of AVX2 code
const Kernels& kernels();
}

}  // namespace sigma
