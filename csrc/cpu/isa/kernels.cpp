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
void fill_column_count(DotKernels<A, W>& t) {
  t[MR][NR] = dot_block<MR, NR, A, W>;
  if constexpr (NR > 1) fill_column_count<MR, NR - 1, A, W>(t);
}

template <int MR, class A, class W>
void fill_row_count(GemmKernels<A, W>& t) {
  if constexpr (MR <= kDotRows) {
    fill_column_count<MR, dot_cols(MR), A, W>(t.dot);
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

template <int MR, class A, class W>
void fill_dots(DotKernels<A, W>& t) {
  fill_column_count<MR, dot_cols(MR), A, W>(t);
  if constexpr (MR > 1) fill_dots<MR - 1, A, W>(t);
}

template <class T>
RowKernels<T> row_table() {
  return {scale_row<T>, add_scaled_row<T>, dot_row<T>, widen_row<T>, narrow_row<T>};
}

const Kernels& kernels() {
  static const Kernels table = [] {
    Kernels t{};
    t.name = SK_TEXT(SK_NS);
    t.lanes = kLanes;
    t.dot_rows = kDotRows;
    for (int rows = 1; rows <= kDotRows; ++rows) t.dot_cols[rows] = dot_cols(rows);
    t.axpy_rows = kAxpyRows;
    t.panel = kPanel;
#if defined(__AVX512BF16__)
    t.multiplies_bf16 = true;
#endif
    fill_row_count<kMaxBlockRows>(t.f32);
    fill_row_count<kMaxBlockRows>(t.widened);
    fill_row_count<kMaxBlockRows>(t.widened_f16);
    fill_row_count<kMaxBlockRows>(t.pairs);
    fill_dots<kDotRows, float, Int8>(t.dot_int8);
    fill_row_count<kMaxBlockRows, float, float>(t.outer_f32);
    fill_row_count<kMaxBlockRows, float, Bf16>(t.outer_narrowed);
    fill_row_count<kMaxBlockRows, float, F16>(t.outer_narrowed_f16);
    fill_row_count<kMaxBlockRows, Bf16, Bf16>(t.outer_pairs);
    fill_row_count<kMaxBlockRows, Bf16, float>(t.outer_pairs_f32);
    t.pair_rows = pair_rows;
    t.swiglu = swiglu_row;
    t.swiglu_backward = swiglu_backward_row;
    t.route_row = route_row;
    t.route_row_backward = route_row_backward;
    t.rows_f32 = row_table<float>();
    t.rows_bf16 = row_table<Bf16>();
    t.rows_f16 = row_table<F16>();
    return t;
  }();
  return table;
}

}  // namespace sigma::SK_NS
