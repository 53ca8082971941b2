// Micro-kernels of the grouped GEMM: registers and nothing else.
//
//   dot_block    c[m][n]  = sum_k a[m][k] * b[n][k]     forward, weights [E, N, K]: both contiguous along k
//   axpy_block   c[m][n]  = sum_k a[m][k] * b[k][n]     input gradient: b contiguous along n
//   outer_block  c[m][n] += sum_r a[r][m] * b[r][n]     weight gradient
//
// Bound of each: 2 FLOPs per multiply-add at two vector FMAs a cycle.  A block of MR x NR vectors loads MR +
// NR vectors for MR * NR FMAs, so it stays under the two loads a cycle that the core has.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace sigma::SK_NS {

#if SK_LANES == 16
constexpr int kDotRows = 6, kDotCols = 4;     // 24 sums + 4 of b + 1 of a = 29 of 32 registers
constexpr int kAxpyRows = 6, kPanelVecs = 4;  // 24 sums + 4 of b + 1 broadcast
#else
constexpr int kDotRows = 3, kDotCols = 4;     // 12 sums + 3 of a + 1 of b = 16, all that AVX2 has
constexpr int kAxpyRows = 6, kPanelVecs = 2;  // 12 sums + 2 of b + 1 broadcast
#endif
constexpr int kPanel = kPanelVecs * kLanes;
template <class W>
constexpr int kLine = 64 / sizeof(W);  // elements in a cache line

template <class W>
SK_INLINE void put(W* p, Vec v, Store mode) {
  if (mode == Store::kStream) return store_streaming(p, v);
  store(p, mode == Store::kAdd ? load(p) + v : v);
}

template <class W>
SK_INLINE void put_partial(W* p, Vec v, int64_t n, Store mode) {
  store_partial(p, mode == Store::kAdd ? load_partial(p, n) + v : v, n);
}

// Writes a block of sums; its last vector may be partial.
template <int NV, class W>
SK_INLINE void put_row(W* c, const Vec* sum, int64_t columns, Store mode) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const int64_t left = columns - v * kLanes;
    if (left >= kLanes)
      put(c + v * kLanes, sum[v], mode);
    else if (left > 0)
      put_partial(c + v * kLanes, sum[v], left, mode);
  }
}

template <int NV, class W>
SK_INLINE void load_row(Vec* x, const W* b, int64_t columns, bool is_full) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const int64_t left = columns - v * kLanes;
    x[v] = is_full || left >= kLanes ? load(b + v * kLanes)
           : left > 0                ? load_partial(b + v * kLanes, left)
                                     : Vec{};
  }
}

template <int MR, int NR, class W>
void dot_block(const DotBlock<W>& d) {
  Vec sum[MR][NR] = {};
  const float* a[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) a[m] = d.a[m];
  const W* b = d.b;
  const int64_t ldb = d.ldb, K = d.K;
  const auto step = [&](int64_t k, auto load_at) SK_STEP {
    Vec w[NR];
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) w[n] = load_at(b + n * ldb + k);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec x = load_at(a[m] + k);
#pragma GCC unroll 4
      for (int n = 0; n < NR; ++n) sum[m][n] += x * w[n];
    }
  };
  const W* ahead = d.prefetch;
  const int lines = d.prefetch_rows ? d.prefetch_lines : 0;
  int row = d.prefetch_rows;
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) {
    for (int l = 0; l < lines; ++l) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += ldb;
      if (--row == 0) {
        row = d.prefetch_rows;
        ahead += kLine<W> - row * ldb;
      }
    }
    step(k, [](const auto* p) SK_STEP { return load(p); });
  }
  if (k < K) step(k, [n = K - k](const auto* p) SK_STEP { return load_partial(p, n); });
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    float* c = d.c[m];
    const float factor = d.scale ? d.scale[m] : 1.0f;
    float value[NR];
    if constexpr (NR == 4) {
      add_lanes4(sum[m], value);
    } else {
      for (int n = 0; n < NR; ++n) value[n] = add_lanes(sum[m][n]);
    }
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) c[n] = d.mode == Store::kAdd ? c[n] + factor * value[n] : factor * value[n];
  }
}

template <int MR, bool kIsFull, bool kHasCopy, class P, class W>
SK_INLINE void axpy_body(const AxpyBlock<P, W>& d) {
  Vec sum[MR][kPanelVecs] = {};
  const float* a[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) a[m] = d.a[m];
  const P* b = d.b;
  float* copy = d.copy;
  const W* prefetch = d.prefetch;
  for (int64_t k = 0; k < d.K; ++k) {
    Vec w[kPanelVecs];
    load_row<kPanelVecs>(w, b, d.columns, kIsFull);
    if constexpr (kHasCopy) {
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) store(copy + v * kLanes, w[v]);
      copy += kPanel;
    }
    for (int l = 0; l < d.prefetch_lines; ++l) __builtin_prefetch(prefetch + kLine<W> * l, 0, 2);
    prefetch += d.prefetch_ld;
    b += d.ldb;
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec x = broadcast(a[m][k]);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) sum[m][v] += x * w[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) put_row<kPanelVecs>(d.c[m], sum[m], d.columns, d.mode);
}

template <int MR, class P, class W>
void axpy_block(const AxpyBlock<P, W>& d) {
  const bool is_full = d.columns == kPanel;
  if (d.copy) return is_full ? axpy_body<MR, true, true>(d) : axpy_body<MR, false, true>(d);
  return is_full ? axpy_body<MR, true, false>(d) : axpy_body<MR, false, false>(d);
}

template <int MR, bool kIsFull, class W>
SK_INLINE void outer_body(const OuterBlock<W>& d) {
  Vec sum[MR][kPanelVecs] = {};
  for (int64_t r = 0; r < d.R; ++r) {
    Vec w[kPanelVecs];
    load_row<kPanelVecs>(w, d.b[r], d.columns, kIsFull);
    const float* a = d.a[r];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec x = broadcast(a[m]);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) sum[m][v] += x * w[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) put_row<kPanelVecs>(d.c + m * d.ldc, sum[m], d.columns, d.mode);
}

template <int MR, class W>
void outer_block(const OuterBlock<W>& d) {
  return d.columns == kPanel ? outer_body<MR, true>(d) : outer_body<MR, false>(d);
}

}  // namespace sigma::SK_NS
