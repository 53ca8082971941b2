// Micro-kernels of the grouped GEMM: registers and nothing else.
//
//   dot_block    c[m][n] = sum_k a[m][k] * b[n][k]     forward, weights [E, N, K]: both contiguous along k
//   panel_block  c[m][n] = sum_s a[s][m] * b[s][n]     input and weight gradient, of packed panels
//
// Each in two arithmetics (kernels.h): float operands, and bf16 operands two at a time along the contraction.
//
// Bound of each: 2 FLOPs per multiply-add at two vector FMAs a cycle.  A block of MR x NR vectors loads MR +
// NR vectors for MR * NR FMAs, so it stays under the two loads a cycle that the core has.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "vec.h"

namespace sigma::SK_NS {

#if SK_LANES == 16
constexpr int kDotRows = 6;  // 24 sums + 4 of b + 1 of a = 29 of 32 registers
constexpr int dot_cols(int rows) { return rows <= 3 ? 8 : 4; }  // few rows: more streams of weights at once
constexpr int kPanelRows = 6, kPanelVecs = 4;                   // 24 sums + 4 of b + 1 broadcast
#else
constexpr int kDotRows = 3;  // 12 sums + 3 of a + 1 of b = 16, all that AVX2 has
constexpr int dot_cols(int rows) { return rows == 1 ? 8 : 4; }
constexpr int kPanelRows = 6, kPanelVecs = 2;  // 12 sums + 2 of b + 1 broadcast
#endif
constexpr int kPanel = kPanelVecs * kLanes;
template <class W>
constexpr int kLine = 64 / sizeof(W);  // elements in a cache line

template <class W>
SK_INLINE void put(W* p, Vec v, Store mode) {
  if (mode == Store::kStream) return store_streaming(p, v);
  store_sum(p, mode == Store::kAdd ? load(p) + v : v);
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

// NV vectors of a row, widened; zeros beyond its columns.
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

// The same of two rows of Bf16, column by column in pairs; without `odd` its place is zero.
template <int NV>
SK_INLINE void load_pair_row(PairVec* x, const Bf16* even, const Bf16* odd, int64_t columns, bool is_full) {
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const int64_t left = columns - v * kLanes;
    const auto bits = [&](const Bf16* p) SK_STEP {
      return !p                          ? HalfVec{}
             : is_full || left >= kLanes ? load_bits(p + v * kLanes)
             : left > 0                  ? load_bits_partial(p + v * kLanes, left)
                                         : HalfVec{};
    };
    x[v] = interleave(bits(even), bits(odd));
  }
}

template <class A>
struct VecOf;  // what a step of the contraction takes from A
template <>
struct VecOf<float> {
  using type = Vec;
};
template <>
struct VecOf<Bf16> {
  using type = PairVec;
};

// A vector of the contraction from operands that lie along it.
template <class A, class T>
SK_INLINE auto load_step(const T* p) {
  if constexpr (kStep<A> == 2)
    return load_pairs(p);
  else
    return load(p);
}
template <class A, class T>
SK_INLINE auto load_step_partial(const T* p, int64_t n) {
  if constexpr (kStep<A> == 2)
    return load_pairs_partial(p, n);
  else
    return load_partial(p, n);
}

// Asks for the lines of an Ahead, some each time.
struct Asker {
  SK_INLINE explicit Asker(const Ahead& ahead)
      : d(ahead),
        back(ahead.next - ahead.run * ahead.stride),
        at(ahead.at),
        of_run(ahead.run),
        left(ahead.count) {}
  SK_INLINE void ask() {
    for (int i = 0; i < d.a_step && left > 0; ++i, --left) {
      __builtin_prefetch(at, 0, 2);
      at += d.stride;
      if (--of_run == 0) {
        of_run = d.run;
        at += back;
      }
    }
  }
  const Ahead& d;
  int64_t back;
  const char* at;
  int of_run, left;
};

// Where all 16 registers are taken, GCC reads an operand again for each use: 41 loads instead of 28 for 48
// multiply-adds, two a cycle.  Not beside weights that are widened, which it makes slower.
template <class V>
SK_INLINE void stay_in_register([[maybe_unused]] V& v) {
#if defined(__AVX__) && SK_LANES == 8
  asm("" : "+x"(v));
#endif
}

template <int MR, int NR, class A, class W>
void dot_block(const DotBlock<A, W>& d) {
  using V = typename VecOf<A>::type;
  constexpr int64_t kElements = kLanes * kStep<A>;  // of the contraction, in one vector
  Vec sum[MR][NR] = {};
  const A* a[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) a[m] = d.a[m];
  const W* b = d.b;
  const int64_t ldb = d.ldb, K = d.K;
  const auto step = [&](int64_t k, auto load_at) SK_STEP {
    // Of the two sides the shorter stays in registers: with 16 of them there is one left for the other.
    constexpr bool kHoldsA = MR < NR;
    V held[kHoldsA ? MR : NR];
#pragma GCC unroll 8
    for (int i = 0; i < (kHoldsA ? MR : NR); ++i)
      held[i] = kHoldsA ? load_at(a[i] + k) : load_at(b + i * ldb + k);
    if constexpr (std::is_same_v<W, float>)
#pragma GCC unroll 8
      for (int i = 0; i < (kHoldsA ? MR : NR); ++i) stay_in_register(held[i]);
#pragma GCC unroll 8
    for (int j = 0; j < (kHoldsA ? NR : MR); ++j) {
      const V other = kHoldsA ? load_at(b + j * ldb + k) : load_at(a[j] + k);
#pragma GCC unroll 8
      for (int i = 0; i < (kHoldsA ? MR : NR); ++i) {
        if constexpr (kHoldsA)
          sum[i][j] = multiply_add(held[i], other, sum[i][j]);
        else
          sum[j][i] = multiply_add(other, held[i], sum[j][i]);
      }
    }
  };
  const auto whole = [](const auto* p) SK_STEP { return load_step<A>(p); };
  int64_t k = 0;
  for (Asker asker(d.ahead); asker.left > 0 && k + kAheadStep * kElements <= K;) {
    asker.ask();
#pragma GCC unroll 4
    for (int i = 0; i < kAheadStep; ++i, k += kElements) step(k, whole);
  }
  for (; k + kElements <= K; k += kElements) step(k, whole);
  if (k < K) step(k, [n = K - k](const auto* p) SK_STEP { return load_step_partial<A>(p, n); });
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
    float* c = d.c[m] + d.column;
    const float factor = d.scale ? d.scale[m] : 1.0f;
    float value[NR];
    constexpr int kByFour = NR / 4 * 4;
#pragma GCC unroll 2
    for (int n = 0; n < kByFour; n += 4) add_lanes4(sum[m] + n, value + n);
    for (int n = kByFour; n < NR; ++n) value[n] = add_lanes(sum[m][n]);
#pragma GCC unroll 8
    for (int n = 0; n < NR; ++n) c[n] = d.mode == Store::kAdd ? c[n] + factor * value[n] : factor * value[n];
  }
}

template <class A, class W>
void pack_block(const PackBlock<A, W>& d) {
  using V = typename VecOf<A>::type;
  const int64_t steps = (d.K + kStep<A> - 1) / kStep<A>;
  const W* b = d.b;
  Packed<A>* row = d.panels;
  for (int64_t k = 0; k < d.K; k += kStep<A>, b += kStep<A> * d.ldb, row += kPanel) {
    Packed<A>* out = row;
    const auto put_panel = [&](int64_t n, bool is_full) SK_STEP {
      V w[kPanelVecs];
      if constexpr (kStep<A> == 2)
        load_pair_row<kPanelVecs>(w, b + n, k + 1 < d.K ? b + d.ldb + n : nullptr, d.columns - n, is_full);
      else
        load_row<kPanelVecs>(w, b + n, d.columns - n, is_full);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) store(out + v * kLanes, w[v]);
    };
    int64_t n = 0;
    for (; n + kPanel <= d.columns; n += kPanel, out += steps * kPanel) put_panel(n, true);
    if (n < d.columns) put_panel(n, false);
  }
}

template <int MR, class A, class C>
void panel_block(const PanelBlock<A, C>& d) {
  using V = typename VecOf<A>::type;
  Vec sum[MR][kPanelVecs] = {};
  const Packed<A>*a = d.a, *b = d.b;
  const auto step = [&]() SK_STEP {
    V w[kPanelVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) w[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const V x = broadcast(a[m]);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) sum[m][v] = multiply_add(x, w[v], sum[m][v]);
    }
    a += kPanelRows;
    b += kPanel;
  };
  int64_t s = 0;
  if (d.ahead.count > 0) {
    Asker asker(d.ahead);
    for (; asker.left > 0 && s + kAheadStep <= d.steps; s += kAheadStep) {
      asker.ask();
#pragma GCC unroll 4
      for (int i = 0; i < kAheadStep; ++i) step();
    }
    asker.ask();  // of fewer steps, all
  }
  for (; s < d.steps; ++s) step();
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) put_row<kPanelVecs>(d.c[m] + d.column, sum[m], d.columns, d.mode);
}

}  // namespace sigma::SK_NS
