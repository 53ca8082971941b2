// The table of one instruction set.  Compiled once for each, see CMakeLists.txt.
#include "kernels.h"

#include "grouped_gemm.h"
#include "route.h"
#include "rows.h"
#include "swiglu.h"

#define SK_TEXT_(x) #x
#define SK_TEXT(x) SK_TEXT_(x)

namespace sigma::SK_NS {

template <int MR, int NR, class A, class W>
void fill_columns(DotKernels<A, W>& t) {
  t.dot[MR][NR] = dot_block<MR, NR, A, W>;
  if constexpr (NR > 1) fill_columns<MR, NR - 1, A, W>(t);
}
template <class A, class W, int MR = kDotRows>
void fill(DotKernels<A, W>& t) {
  fill_columns<MR, dot_cols(MR), A, W>(t);
  if constexpr (MR > 1) fill<A, W, MR - 1>(t);
}
template <class A, class C, int MR = kPanelRows>
void fill(PanelKernels<A, C>& t) {
  t.panel_product[MR] = panel_block<MR, A, C>;
  if constexpr (MR > 1) fill<A, C, MR - 1>(t);
}
template <class A, class W>
void fill_gemm(GemmKernels<A, W>& t) {
  fill<A, W>(static_cast<DotKernels<A, W>&>(t));
  fill<A, W>(static_cast<PanelKernels<A, W>&>(t));
  static_cast<PackKernels<A, W>&>(t).pack = pack_block<A, W>;
}
template <class T>
void fill_rows(RowKernels<T>& t) {
  t = {scale_row<T, T>, scale_row<T, float>, add_scaled_row<T>, dot_row<T>, widen_row<T>, narrow_row<T>};
}

const Kernels& kernels() {
  static const Kernels table = [] {
    Kernels t{};
    t.name = SK_TEXT(SK_NS);
    t.lanes = kLanes;
    t.dot_rows = kDotRows;
    for (int rows = 1; rows <= kDotRows; ++rows) t.dot_cols[rows] = dot_cols(rows);
    t.panel_rows = kPanelRows;
    t.panel = kPanel;
#if defined(__AVX512BF16__)
    t.multiplies_bf16 = true;
#endif
    fill_gemm<float, float>(t);
    fill_gemm<float, Bf16>(t);
    fill_gemm<float, F16>(t);
    fill_gemm<Bf16, Bf16>(t);
    fill<Bf16, float>(static_cast<PanelKernels<Bf16, float>&>(t));
    fill<float, Int8>(static_cast<DotKernels<float, Int8>&>(t));
    fill_rows<float>(t);
    fill_rows<Bf16>(t);
    fill_rows<F16>(t);
    t.pair_rows = pair_rows;
    t.swiglu = swiglu_row;
    t.swiglu_backward = swiglu_backward_row;
    t.route_row = route_row;
    t.route_row_backward = route_row_backward;
    return t;
  }();
  return table;
}

}  // namespace sigma::SK_NS
