// The table of one instruction set.  Compiled once for each, see CMakeLists.txt.
#include "kernels.h"

#include "grouped_gemm.h"
#include "route.h"
#include "rows.h"
#include "swiglu.h"

#define SK_TEXT_(x) #x
#define SK_TEXT(x) SK_TEXT_(x)

namespace sigma::SK_NS {

template <int MR, class W>
void fill_row_count(GemmKernels<W>& t) {
  if constexpr (MR <= kDotRows) {
    t.dot[MR][1] = dot_block<MR, 1, W>;
    t.dot[MR][2] = dot_block<MR, 2, W>;
    t.dot[MR][3] = dot_block<MR, 3, W>;
    t.dot[MR][4] = dot_block<MR, 4, W>;
  }
  if constexpr (MR <= kAxpyRows) {
    t.axpy[MR] = axpy_block<MR, W, W>;
    t.axpy_packed[MR] = axpy_block<MR, float, W>;
    t.outer[MR] = outer_block<MR, W>;
  }
  if constexpr (MR > 1) fill_row_count<MR - 1>(t);
}

const Kernels& kernels() {
  static const Kernels table = [] {
    Kernels t{};
    t.name = SK_TEXT(SK_NS);
    t.lanes = kLanes;
    t.dot_rows = kDotRows;
    t.dot_cols = kDotCols;
    t.axpy_rows = kAxpyRows;
    t.panel = kPanel;
    fill_row_count<kMaxBlockRows>(t.f32);
    fill_row_count<kMaxBlockRows>(t.bf16);
    t.widen_row = widen_row;
    t.narrow_row = narrow_row;
    t.swiglu = swiglu_row;
    t.swiglu_backward = swiglu_backward_row;
    t.route_row = route_row;
    t.route_row_backward = route_row_backward;
    t.copy_row = copy_row;
    t.scale_row = scale_row;
    t.add_scaled_row = add_scaled_row;
    t.dot_row = dot_row;
    return t;
  }();
  return table;
}

}  // namespace sigma::SK_NS
