// Blocking and schedule of the grouped GEMM.
//
// Tasks are (expert, block of columns or chunk of rows), handed out dynamically, so one crowded expert still
// feeds every core. Each output element is summed by one task in a fixed order: same bits at any thread
// count.
//
// Bound at E=96, T=2048, top-1: each weight is used for 21 rows, 10 FLOPs a byte, where a core computes about
// as fast as it reads.  So every loop asks for the next block's weights while it computes on this one.
#include "grouped_gemm.h"

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "scratch.h"

namespace sigma::cpu {
namespace {

constexpr int64_t kWindow =
    8;  // rows of W fetched ahead together: 1.2x over one at a time (E=96, T=2048, AVX-512)
constexpr int64_t kWidth = 1024;  // columns of a task of grouped_gemm_nn
constexpr int64_t kDepth =
    32;  // rows of W per panel: 2.3x over 128 (same shape); the prefetcher follows 32 pages
constexpr int64_t kOuterRows = 256;   // contraction of the weight gradient per pass
constexpr double kSerialFlops = 1e5;  // below this a parallel region costs more than it saves

template <class W>
constexpr int64_t kLine = 64 / sizeof(W);  // elements in a cache line

// At most kRowChunk rows in nearly equal blocks of at most `limit`.  Found once: a division costs as much as
// ten multiply-adds.
struct RowBlocks {
  RowBlocks(int64_t n, int64_t limit) : count(ceil_div(n, limit)), most(count ? ceil_div(n, count) : 0) {
    for (int64_t i = 0; i <= count; ++i) first[i] = count ? piece(n, count, i) : 0;
  }
  int64_t rows(int64_t i) const { return first[i + 1] - first[i]; }

  int64_t count, most;
  int64_t first[kRowChunk + 1];
};

bool is_serial(int threads, double flops) { return threads == 1 || flops < kSerialFlops; }

}  // namespace

ColumnTasks::ColumnTasks(int64_t E, const int32_t* offsets, int64_t N, int threads)
    : columns(N), width(kColumnBlock) {
  busy.reserve(std::min<int64_t>(E, offsets[E]));
  for (int64_t e = 0; e < E; ++e)
    if (offsets[e] < offsets[e + 1]) busy.push_back(static_cast<int32_t>(e));
  const auto experts = static_cast<int64_t>(busy.size());
  while (width > 16 && experts * ceil_div(N, width) < 16 * threads) width /= 2;
  blocks = ceil_div(N, width);
  count = experts * blocks;
  at_once = static_cast<int>(std::clamp<int64_t>(count / (8 * threads), 1, 4));
}

template <class X, class W, class Y>
void gemm_nt_columns(const Kernels& isa, const GroupedGemm<X, W, Y>& g, int64_t e, int64_t r0, int64_t r1,
                     int64_t n0, int64_t n1, const W* next) {
  constexpr bool kIsDirect = std::is_same_v<Y, float>;
  alignas(64) float tile[kIsDirect ? 1 : kRowChunk * kColumnBlock];  // sums, before they are rounded
  const X* a[kRowChunk];
  float *c[kRowChunk], scale[kRowChunk];
  const W* w = g.w + e * g.w_expert;
  for (int64_t chunk = r0; chunk < r1; chunk += kRowChunk) {
    const int64_t rows = std::min(kRowChunk, r1 - chunk);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t r = chunk + i;
      a[i] = g.x(r);
      if constexpr (kIsDirect)
        c[i] = g.y(r) + n0;
      else
        c[i] = tile + i * kColumnBlock;
      if (g.scale) scale[i] = g.scale[g.slot_of_row ? g.slot_of_row[r] : r];
    }
    const RowBlocks blocks(rows, isa.dot_rows);
    // While the groups of one window are computed, each call asks for its share of the next window's lines.
    const int64_t most_cols = isa.dot_cols[blocks.most], groups = kWindow / most_cols;
    const int64_t calls = groups * blocks.count, lines = g.K / kLine<W>;
    const int64_t lines_a_step = ceil_div(kWindow * isa.lanes * kStep<X>, kLine<W> * calls);
    for (int64_t window = n0; window < n1; window += kWindow) {
      const int64_t end = window + kWindow;
      const W* ahead = end + kWindow <= n1 ? w + end * g.w_row : end >= n1 ? next : nullptr;
      int64_t call = 0;
      for (int64_t n = window; n < std::min(n1, end); n += most_cols)
        for (int64_t i = 0; i < blocks.count; ++i, ++call)
          static_cast<const DotKernels<X, W>&>(isa).dot[blocks.rows(i)][std::min(most_cols, n1 - n)](
              {.a = a + blocks.first[i],
               .b = w + n * g.w_row,
               .ldb = g.w_row,
               .c = c + blocks.first[i],
               .column = n - n0,
               .scale = g.scale ? scale + blocks.first[i] : nullptr,
               .K = g.K,
               .mode = Store::kWrite,
               .prefetch = ahead ? ahead + piece(lines, calls, call) * kLine<W> : nullptr,
               .prefetch_rows = ahead ? static_cast<int>(kWindow) : 0,
               .prefetch_lines = static_cast<int>(lines_a_step)});
    }
    if (g.column_scale) {
      const float* factor = g.column_scale + e * g.N;
      for (int64_t r = 0; r < rows; ++r) {
        float* y = tile + r * kColumnBlock;
        if constexpr (kIsDirect) y = g.y(chunk + r) + n0;
        for (int64_t n = n0; n < n1; ++n) y[n - n0] *= factor[n];
      }
    }
    if constexpr (!kIsDirect)
      for (int64_t r = 0; r < rows; ++r)
        static_cast<const RowKernels<Y>&>(isa).narrow(tile + r * kColumnBlock, g.y(chunk + r) + n0, n1 - n0);
  }
}

template <class X, class W, class Y>
void grouped_gemm_nt(const GroupedGemm<X, W, Y>& g) {
  const Kernels& isa = kernels();
  const ColumnTasks tasks(g.E, g.offsets, g.N, g.threads);
#pragma omp parallel for schedule(dynamic, tasks.at_once) \
    num_threads(g.threads) if (!is_serial(g.threads, 2.0 * g.offsets[g.E] * g.N * g.K))
  for (int64_t i = 0; i < tasks.count; ++i) {
    const auto [e, n0, n1, continues] = tasks[i];
    const W* const next = continues ? g.w + e * g.w_expert + n1 * g.w_row : nullptr;
    gemm_nt_columns(isa, g, e, g.offsets[e], g.offsets[e + 1], n0, n1, next);
  }
}

template <class X, class W, class Y>
void gemm_nn_columns(const Kernels& isa, const GroupedGemm<X, W, Y>& g, int64_t e, int64_t r0, int64_t r1,
                     int64_t n0, int64_t n1, Rows<float> y) {
  constexpr int64_t kPanelRows = kDepth * kStep<X>;
  alignas(64) Packed<X> copy[kDepth * 64];
  const W* w = g.w + e * g.w_expert;
  const X* a[kRowChunk];
  float* c[kRowChunk];
  const int64_t rows = r1 - r0;
  for (int64_t i = 0; i < rows; ++i) {
    a[i] = g.x(r0 + i);
    c[i] = y(r0 + i);
    if (g.K == 0) std::fill(c[i], c[i] + n1 - n0, 0.0f);
  }
  const RowBlocks blocks(rows, isa.axpy_rows);
  for (int64_t k = 0; k < g.K; k += kPanelRows) {
    const int64_t depth = std::min(kPanelRows, g.K - k);
    for (int64_t n = n0; n < n1; n += isa.panel) {
      const int64_t cols = std::min<int64_t>(isa.panel, n1 - n);
      const int64_t next_lines = ceil_div(std::min<int64_t>(isa.panel, n1 - n - cols), kLine<W>);
      const W* panel = w + k * g.w_row + n;
      for (int64_t i = 0; i < blocks.count; ++i) {
        // The first block of rows reads the weights and keeps them packed for the others.
        const int64_t line = piece(next_lines, blocks.count, i);
        const auto block = [&]<class P>(const P* source, int64_t ld, Packed<X>* keep) {
          return AxpyBlock<X, P, W>{
              .a = a + blocks.first[i],
              .depth = k,
              .b = source,
              .ldb = ld,
              .copy = keep,
              .c = c + blocks.first[i],
              .column = n - n0,
              .K = depth,
              .columns = cols,
              .mode = k > 0 ? Store::kAdd : Store::kWrite,
              .prefetch = panel + cols + line * kLine<W>,
              .prefetch_ld = g.w_row,
              .prefetch_lines = static_cast<int>(piece(next_lines, blocks.count, i + 1) - line)};
        };
        if (i == 0)
          static_cast<const AxpyKernels<X, W>&>(isa).axpy[blocks.rows(i)](
              block(panel, g.w_row, blocks.count > 1 ? copy : nullptr));
        else
          static_cast<const AxpyKernels<X, W>&>(isa).axpy_packed[blocks.rows(i)](
              block(static_cast<const Packed<X>*>(copy), isa.panel, nullptr));
      }
    }
  }
}

template <class X, class W, class Y>
void grouped_gemm_nn(const GroupedGemm<X, W, Y>& g) {
  const Kernels& isa = kernels();
  int64_t most = 0;
  for (int64_t e = 0; e < g.E; ++e) most = std::max<int64_t>(most, g.offsets[e + 1] - g.offsets[e]);
  const int64_t chunks = ceil_div(most, kRowChunk), blocks = ceil_div(g.N, kWidth);
  constexpr bool kIsDirect = std::is_same_v<Y, float>;
  const Scratch scratch(g.threads, kIsDirect ? 0 : std::min(most, kRowChunk) * std::min(kWidth, g.N) * 4);
#pragma omp parallel for collapse(3) schedule(dynamic) \
    num_threads(g.threads) if (!is_serial(g.threads, 2.0 * g.offsets[g.E] * g.N * g.K))
  for (int64_t e = 0; e < g.E; ++e)
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t r0 = g.offsets[e] + chunk * kRowChunk;
        const int64_t r1 = std::min<int64_t>(g.offsets[e + 1], r0 + kRowChunk);
        const int64_t n0 = i * kWidth, n1 = std::min(g.N, n0 + kWidth);
        if (r0 >= r1) continue;
        if constexpr (kIsDirect) {
          Rows<float> y = g.y;
          y.base += n0;
          gemm_nn_columns(isa, g, e, r0, r1, n0, n1, y);
        } else {
          const Rows<float> sums{.base = scratch.mine<float>(), .ld = n1 - n0, .first = r0};
          gemm_nn_columns(isa, g, e, r0, r1, n0, n1, sums);
          for (int64_t r = r0; r < r1; ++r)
            static_cast<const RowKernels<Y>&>(isa).narrow(sums(r), g.y(r) + n0, n1 - n0);
        }
      }
}

namespace {

// The rows of one operand that a task contracts over, at most kOuterRows: where they lie, or packed in pairs.
template <class X>
struct Contraction {
  const Packed<X>* row[kOuterRows];

  // Columns c0..c1 of rows r0..r0+rows; `pairs` has room for them where they are packed.
  Contraction(const Kernels& isa, const Rows<const X>& x, int64_t r0, int64_t rows, int64_t c0, int64_t c1,
              [[maybe_unused]] Packed<X>* pairs) {
    for (int64_t i = 0; i * kStep<X> < rows; ++i) {
      const int64_t r = r0 + i * kStep<X>;
      if constexpr (kStep<X> == 1) {
        row[i] = x(r) + c0;
      } else {
        Pair* const packed = pairs + i * (c1 - c0);
        isa.pair_rows(x(r) + c0, r + 1 < r0 + rows ? x(r + 1) + c0 : nullptr, packed, c1 - c0);
        row[i] = packed;
      }
    }
  }
};

// Rows m0..m1 of one expert's gradient, written to or added to c [m1 - m0, ldc].
template <class X, class W, class C>
void outer_rows(const Kernels& isa, const GroupedOuter<X, W>& g, int64_t e, int64_t m0, int64_t m1, C* c,
                int64_t ldc, bool adds, bool streams, Packed<X>* pairs) {
  const int64_t r0 = g.offsets[e], r1 = g.offsets[e + 1];
  int64_t chunk = r0;
  do {  // once even without rows: the gradient of an idle expert is zero, not unwritten
    const int64_t rows = std::min(kOuterRows, r1 - chunk), steps = ceil_div(rows, kStep<X>);
    const Store mode = adds || chunk > r0                 ? Store::kAdd
                       : streams && r1 - r0 <= kOuterRows ? Store::kStream
                                                          : Store::kWrite;
    const Contraction<X> a_rows(isa, g.a, chunk, rows, m0, m1, pairs);
    const Contraction<X> b_rows(isa, g.b, chunk, rows, 0, g.B, pairs + steps * (m1 - m0));
    const Packed<X>*a[kOuterRows], *b[kOuterRows];
    for (int64_t m = m0; m < m1; m += isa.axpy_rows) {
      const int64_t count = std::min<int64_t>(isa.axpy_rows, m1 - m);
      for (int64_t i = 0; i < steps; ++i) a[i] = a_rows.row[i] + (m - m0);
      for (int64_t n = 0; n < g.B; n += isa.panel) {
        for (int64_t i = 0; i < steps; ++i) b[i] = b_rows.row[i] + n;
        static_cast<const OuterKernels<X, C>&>(isa).outer[count](
            {.a = a,
             .b = b,
             .c = c + (m - m0) * ldc + n,
             .ldc = ldc,
             .R = steps,
             .columns = std::min<int64_t>(isa.panel, g.B - n),
             .mode = mode});
      }
    }
    chunk += kOuterRows;
  } while (chunk < r1);
}

// A narrow gradient of an expert with many rows is summed in f32 and rounded once, as one with few rows is.
template <class X, class W>
void outer_rows_rounded_once(const Kernels& isa, const GroupedOuter<X, W>& g, int64_t e, int64_t m0,
                             int64_t m1, float* sum, Packed<X>* pairs) {
  W* const out = g.out + e * g.out_expert;
  for (int64_t m = m0; g.adds && m < m1; ++m)
    static_cast<const RowKernels<W>&>(isa).widen(out + m * g.out_row, sum + (m - m0) * g.B, g.B);
  outer_rows(isa, g, e, m0, m1, sum, g.B, g.adds, false, pairs);
  for (int64_t m = m0; m < m1; ++m)
    static_cast<const RowKernels<W>&>(isa).narrow(sum + (m - m0) * g.B, out + m * g.out_row, g.B);
}

}  // namespace

template <class X, class W>
void grouped_outer(const GroupedOuter<X, W>& g) {
  const Kernels& isa = kernels();
  // Packing b in pairs costs a task what it saves only if it is used for many rows of the result.
  const int64_t height = (kStep<X> == 1 ? 8 : 40) * isa.axpy_rows, blocks = ceil_div(g.A, height);
  const int64_t misaligned = reinterpret_cast<uintptr_t>(g.out) % 64 + g.out_row % kLine<W> +
                             g.out_expert % kLine<W> + g.B % kLine<W>;
  const bool streams = misaligned == 0;
  int64_t most = 0;
  for (int64_t e = 0; e < g.E; ++e) most = std::max<int64_t>(most, g.offsets[e + 1] - g.offsets[e]);
  const bool has_sums = !std::is_same_v<W, float> && most > kOuterRows;
  const int64_t tall = std::min(height, g.A), sum_floats = has_sums ? tall * g.B : 0;
  const int64_t pairs_a_row = kStep<X> == 2 ? ceil_div(std::min(most, kOuterRows), 2) : 0;
  const Scratch scratch(g.threads, (sum_floats + pairs_a_row * (tall + g.B)) * 4);
#pragma omp parallel num_threads( \
        g.threads) if (!is_serial(g.threads, 2.0 * g.offsets[g.E] * g.A * g.B + g.E * g.A * g.B))
  {
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t e = 0; e < g.E; ++e)
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t rows = g.offsets[e + 1] - g.offsets[e];
        const int64_t m0 = i * height, m1 = std::min(g.A, m0 + height);
        if (g.adds && rows == 0) continue;
        Packed<X>* const pairs = scratch.mine<Packed<X>>(sum_floats);
        if constexpr (!std::is_same_v<W, float>) {
          if (rows > kOuterRows) {
            outer_rows_rounded_once(isa, g, e, m0, m1, scratch.mine<float>(), pairs);
            continue;
          }
        }
        outer_rows(isa, g, e, m0, m1, g.out + e * g.out_expert + m0 * g.out_row, g.out_row, g.adds, streams,
                   pairs);
      }
    std::atomic_thread_fence(std::memory_order_seq_cst);  // streaming stores are weakly ordered
  }
}

#define SK_INSTANTIATE(X, W, Y)                                                                         \
  template void gemm_nt_columns(const Kernels&, const GroupedGemm<X, W, Y>&, int64_t, int64_t, int64_t, \
                                int64_t, int64_t, const W*);                                            \
  template void gemm_nn_columns(const Kernels&, const GroupedGemm<X, W, Y>&, int64_t, int64_t, int64_t, \
                                int64_t, int64_t, Rows<float>);                                         \
  template void grouped_gemm_nt(const GroupedGemm<X, W, Y>&);                                           \
  template void grouped_gemm_nn(const GroupedGemm<X, W, Y>&);
SK_INSTANTIATE(float, float, float)
SK_INSTANTIATE(float, Bf16, float)
SK_INSTANTIATE(float, F16, float)
SK_INSTANTIATE(Bf16, Bf16, Bf16)
SK_INSTANTIATE(Bf16, Bf16, float)
#undef SK_INSTANTIATE
template void grouped_outer(const GroupedOuter<float, float>&);
template void grouped_outer(const GroupedOuter<float, Bf16>&);
template void grouped_outer(const GroupedOuter<float, F16>&);
template void grouped_outer(const GroupedOuter<Bf16, Bf16>&);
// Forward alone: weights of one byte are not trained.
template void gemm_nt_columns(const Kernels&, const GroupedGemm<float, Int8, float>&, int64_t, int64_t,
                              int64_t, int64_t, int64_t, const Int8*);
template void grouped_gemm_nt(const GroupedGemm<float, Int8, float>&);

}  // namespace sigma::cpu
