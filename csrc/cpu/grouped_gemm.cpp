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
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "scratch.h"

namespace sigma::cpu {
namespace {

constexpr int kWindow =
    8;  // rows of W fetched ahead together: 1.2x over one at a time (E=96, T=2048, AVX-512)
constexpr int64_t kWidth = 1024;  // columns of a task of grouped_gemm_nn
constexpr int64_t kDepth =
    32;  // rows of W per panel: 2.3x over 128 (same shape); the prefetcher follows 32 pages
constexpr int64_t kAhead =
    64;  // columns of a panel's rows fetched ahead together: four lines of f32, whatever the panel's width

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
               .prefetch_rows = kWindow,
               .prefetch_lines = static_cast<int>(lines_a_step),
               .prefetch_steps =
                   ahead ? ceil_div(kWindow * (piece(lines, calls, call + 1) - piece(lines, calls, call)),
                                    lines_a_step)
                         : 0});
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
  const int64_t panels = kAhead / isa.panel, calls = panels * blocks.count;
  for (int64_t k = 0; k < g.K; k += kPanelRows) {
    const int64_t depth = std::min(kPanelRows, g.K - k);
    for (int64_t group = n0; group < n1; group += kAhead) {
      // While the panels of one group are computed, each call asks for its share of the next group's lines.
      const bool turns = group + kAhead >= n1;
      const W* const ahead = w + (turns ? k + depth : k) * g.w_row + (turns ? n0 : group + kAhead);
      const int64_t wanted = turns ? (k + depth < g.K ? n1 - n0 : 0) : n1 - group - kAhead;
      const int64_t lines = ceil_div(std::min(kAhead, wanted), kLine<W>);
      int64_t call = 0;
      for (int64_t n = group; n < std::min(n1, group + kAhead); n += isa.panel) {
        const int64_t cols = std::min<int64_t>(isa.panel, n1 - n);
        for (int64_t i = 0; i < blocks.count; ++i, ++call) {
          // The first block of rows reads the weights and keeps them packed for the others.
          const int64_t line = piece(lines, calls, call);
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
                .prefetch = ahead + line * kLine<W>,
                .prefetch_ld = g.w_row,
                .prefetch_lines = static_cast<int>(piece(lines, calls, call + 1) - line)};
          };
          if (i == 0)
            static_cast<const AxpyKernels<X, W>&>(isa).axpy[blocks.rows(i)](
                block(w + k * g.w_row + n, g.w_row, blocks.count > 1 ? copy : nullptr));
          else
            static_cast<const AxpyKernels<X, W>&>(isa).axpy_packed[blocks.rows(i)](
                block(static_cast<const Packed<X>*>(copy), isa.panel, nullptr));
        }
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
// Forward alone: weights of one byte are not trained.
template void gemm_nt_columns(const Kernels&, const GroupedGemm<float, Int8, float>&, int64_t, int64_t,
                              int64_t, int64_t, int64_t, const Int8*);
template void grouped_gemm_nt(const GroupedGemm<float, Int8, float>&);

}  // namespace sigma::cpu
