// The table of one instruction set.  Compiled once for each, see CMakeLists.txt.
#include "kernels.h"

#include "grouped_gemm.h"
#include "route.h"
#include "rows.h"
#include "swiglu.h"

#define SK_TEXT_(x) #x
#define SK_TEXT(x) SK_TEXT_(x)

namespace sigma::SK_NS {

template <int MR, class A, class W>
void fill_row_count(GemmKernels<A, W>& t) {
  if constexpr (MR <= kDotRows) {
    t.dot[MR][1] = dot_block<MR, 1, A, W>;
    t.dot[MR][2] = dot_block<MR, 2, A, W>;
    t.dot[MR][3] = dot_block<MR, 3, A, W>;
    t.dot[MR][4] = dot_block<MR, 4, A, W>;
  }
  if constexpr (MR <= kAxpyRows) {
    t.axpy[MR] = axpy_block<MR, A, W, W>;
    t.axpy_packed[MR] = axpy_block<MR, A, Packed<A>, W>;
  }
  if constexpr (MR > 1) fill_row_count<MR - 1>(t);
}

template <int MR, class A, class W>
void fill_row_count(OuterKernels<A, W>& t) {
  if constexpr (MR <= kAxpyRows) t[MR] = outer_block<MR, A, W>;
  if constexpr (MR > 1) fill_row_count<MR - 1, A, W>(t);
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
#if defined(__AVX512BF16__)
    t.multiplies_bf16 = true;
#endif
    fill_row_count<kMaxBlockRows>(t.f32);
    fill_row_count<kMaxBlockRows>(t.widened);
    fill_row_count<kMaxBlockRows>(t.pairs);
    fill_row_count<kMaxBlockRows, float, float>(t.outer_f32);
    fill_row_count<kMaxBlockRows, float, Bf16>(t.outer_narrowed);
    fill_row_count<kMaxBlockRows, Bf16, Bf16>(t.outer_pairs);
    fill_row_count<kMaxBlockRows, Bf16, float>(t.outer_pairs_f32);
    t.widen_row = widen_row;
    t.narrow_row = narrow_row;
    t.pair_rows = pair_rows;
    t.swiglu = swiglu_row;
    t.swiglu_backward = swiglu_backward_row;
    t.route_row = route_row;
    t.route_row_backward = route_row_backward;
    t.rows_f32 = {scale_row<float>, add_scaled_row<float>, dot_row<float>};
    t.rows_bf16 = {scale_row<Bf16>, add_scaled_row<Bf16>, dot_row<Bf16>};
    return t;
  }();
  return table;
}

}  // namespace sigma::SK_NS
