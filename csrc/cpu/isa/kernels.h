// The contract between schedules and micro-kernels: one table of functions per instruction set.
#pragma once

#include <stdint.h>

namespace sigma {

constexpr int kMaxBlockRows = 8;

// How an output block reaches memory.
enum class Store { kWrite, kAdd, kStream };

// A block of rows of A times rows of B, both contiguous along the contraction.
struct DotBlock {
  const float* const* a;  // rows of A
  const float* b;         // rows of B, ldb apart
  int64_t ldb;
  float* const* c;     // rows of C
  const float* scale;  // a factor for each row of C, or null
  int64_t K;
  Store mode;
  // Weights that come later, for the cache: a window of rows ldb apart, walked down, then a line along.  Many
  // short streams at once keep the hardware's own prefetcher busy; row after row would not.
  const float* prefetch;
  int prefetch_rows;   // of the window, 0: none
  int prefetch_lines;  // a step of the contraction
};

// A block of rows of A times a panel of B that is contiguous along the output.
struct AxpyBlock {
  const float* const* a;
  const float* b;  // [K rows, ldb apart], columns of the panel
  int64_t ldb;
  float* copy;  // where to keep the panel, packed to its width, or null
  float* const* c;
  int64_t K;
  int64_t columns;  // of the panel, 1 .. its width
  Store mode;
  const float* prefetch;  // as above, prefetch[k * prefetch_ld + l * 16]
  int64_t prefetch_ld;
  int prefetch_lines;
};

// A block of A^T B: the sum over rows of outer products.
struct OuterBlock {
  const float* const* a;  // R rows, already at the block's first column
  const float* const* b;
  float* c;
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

struct Kernels {
  const char* name;
  int lanes;
  int dot_rows, dot_cols;  // largest block; dot[rows][cols]
  void (*dot[kMaxBlockRows + 1][5])(const DotBlock&);
  int axpy_rows, panel;  // largest block in rows, panel width in floats
  void (*axpy[kMaxBlockRows + 1])(const AxpyBlock&);
  void (*outer[kMaxBlockRows + 1])(const OuterBlock&);
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
