// The contract between schedules and micro-kernels: one table of functions per instruction set.
#pragma once

#include <stdint.h>

namespace sigma {

constexpr int kMaxBlockRows = 8;

// bfloat16 as it is stored: the upper half of a float.  Arithmetic is in f32.
struct Bf16 {
  uint16_t bits;
};

// How an output block reaches memory.
enum class Store { kWrite, kAdd, kStream };

// In all three products W is how weights and their gradients are stored, float or Bf16; all else is float.

// A block of rows of A times rows of B, both contiguous along the contraction.
template <class W>
struct DotBlock {
  const float* const* a;  // rows of A
  const W* b;             // rows of B, ldb apart
  int64_t ldb;
  float* const* c;     // rows of C
  const float* scale;  // a factor for each row of C, or null
  int64_t K;
  Store mode;
  // Weights that come later, for the cache: a window of rows ldb apart, walked down, then a line along.  Many
  // short streams at once keep the hardware's own prefetcher busy; row after row would not.
  const W* prefetch;
  int prefetch_rows;   // of the window, 0: none
  int prefetch_lines;  // a step of the contraction
};

// A block of rows of A times a panel of B that is contiguous along the output.
// `P` is how the panel is stored: as W, or as float where it is a packed copy.
template <class P, class W>
struct AxpyBlock {
  const float* const* a;
  const P* b;  // [K rows, ldb apart], columns of the panel
  int64_t ldb;
  float* copy;  // where to keep the panel, packed to its width, or null
  float* const* c;
  int64_t K;
  int64_t columns;  // of the panel, 1 .. its width
  Store mode;
  const W* prefetch;  // as above, line l of prefetch + k * prefetch_ld
  int64_t prefetch_ld;
  int prefetch_lines;
};

// A block of A^T B: the sum over rows of outer products.
template <class W>
struct OuterBlock {
  const float* const* a;  // R rows, already at the block's first column
  const float* const* b;
  W* c;
  int64_t ldc;
  int64_t R;
  int64_t columns;
  Store mode;
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
};

struct RouteRowBackward {
  const float* logits;
  int64_t E;
  int k;
  bool is_softmax;
  bool is_normalized;
  const int32_t* indices;
  const float* grad_weights;
  float* grad_logits;  // [E]
};

// By rows of the block, and for dot also by its columns.
template <class W>
struct GemmKernels {
  void (*dot[kMaxBlockRows + 1][5])(const DotBlock<W>&);
  void (*axpy[kMaxBlockRows + 1])(const AxpyBlock<W, W>&);
  void (*axpy_packed[kMaxBlockRows + 1])(const AxpyBlock<float, W>&);
  void (*outer[kMaxBlockRows + 1])(const OuterBlock<W>&);
};

struct Kernels {
  const char* name;
  int lanes;
  int dot_rows, dot_cols;  // largest block of dot
  int axpy_rows, panel;    // largest block in rows of axpy and outer, panel width in elements
  GemmKernels<float> f32;
  GemmKernels<Bf16> bf16;
  void (*widen_row)(const Bf16* x, float* y, int64_t n);
  void (*narrow_row)(const float* x, Bf16* y, int64_t n);  // to the nearest, ties to even
  void (*swiglu)(const float* gate, const float* up, float* out, int64_t n);
  // Also returns sum_i grad_out[i] * out[i], the gradient of a factor on the row, and writes factor * out.
  float (*swiglu_backward)(const float* grad_out, const float* gate, const float* up, float factor,
                           float* grad_gate, float* grad_up, float* scaled_out, int64_t n);
  void (*route_row)(const RouteRow&);
  void (*route_row_backward)(const RouteRowBackward&);
  void (*copy_row)(const float* x, float* y, int64_t n);
  void (*scale_row)(const float* x, float factor, float* y, int64_t n);
  void (*add_scaled_row)(const float* x, float factor, float* y, int64_t n);
  float (*dot_row)(const float* x, const float* y, int64_t n);
};

template <class W>
const GemmKernels<W>& gemms(const Kernels& isa);
template <>
inline const GemmKernels<float>& gemms<float>(const Kernels& isa) {
  return isa.f32;
}
template <>
inline const GemmKernels<Bf16>& gemms<Bf16>(const Kernels& isa) {
  return isa.bf16;
}

namespace base {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}

}  // namespace sigma
