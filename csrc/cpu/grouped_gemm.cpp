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
#include <bit>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "scratch.h"
#include "spaced_rows.h"

namespace sigma::cpu {
namespace {

constexpr int kWindow =
    8;  // rows of W fetched ahead together: 1.2x over one at a time (E=96, T=2048, AVX-512)
constexpr int64_t kWidth = 1024;      // columns of a task of grouped_gemm_nn
constexpr int64_t kGroup = 64;        // columns packed at once, four lines of f32
constexpr int64_t kPanelSize = 2048;  // elements of one panel, 8 KiB: it stays in the first cache
constexpr int64_t kFewRows = 2;       // of an expert: more take longer by rows of y than by packed panels

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

float widened(float x) { return x; }
float widened(Bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

// Rows of x from column k on, blocks of them one after another, each [steps, panel_rows].  Rows of a model
// are whole pages apart: where they lie they would share a set of the first cache.
template <class X>
void pack_rows(const Kernels& isa, const X* const* x, const RowBlocks& blocks, int64_t k, int64_t depth,
               Packed<X>* out) {
  const int64_t steps = ceil_div(depth, kStep<X>);
  for (int64_t i = 0; i < blocks.count; ++i, out += steps * isa.panel_rows)
    for (int64_t m = 0; m < blocks.rows(i); ++m) {
      const X* const row = x[blocks.first[i] + m] + k;
      for (int64_t s = 0; s < steps; ++s) {
        if constexpr (kStep<X> == 1)
          out[s * isa.panel_rows + m] = row[s];
        else
          out[s * isa.panel_rows + m] = {row[2 * s].bits |
                                         (2 * s + 1 < depth ? uint32_t{row[2 * s + 1].bits} << 16 : 0)};
      }
    }
}

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
    const int64_t share = ceil_div(lines, calls);
    const int a_step = asked_a_step(kWindow * share, ceil_div(g.K, isa.lanes * kStep<X>));
    for (int64_t window = n0; window < n1; window += kWindow) {
      const int64_t end = window + kWindow;
      const W* ahead = end + kWindow <= n1 ? w + end * g.w_row : end >= n1 ? next : nullptr;
      int64_t line = ahead ? 0 : lines;
      for (int64_t n = window; n < std::min(n1, end); n += most_cols)
        for (int64_t i = 0; i < blocks.count; ++i, line += share)
          static_cast<const DotKernels<X, W>&>(isa).dot[blocks.rows(i)][std::min(most_cols, n1 - n)](
              {.a = a + blocks.first[i],
               .b = w + n * g.w_row,
               .ldb = g.w_row,
               .c = c + blocks.first[i],
               .column = n - n0,
               .scale = g.scale ? scale + blocks.first[i] : nullptr,
               .K = g.K,
               .mode = Store::kWrite,
               .ahead = {
                   .at = line < lines ? reinterpret_cast<const char*>(ahead + line * kLine<W>) : nullptr,
                   .stride = g.w_row * static_cast<int64_t>(sizeof(W)),
                   .next = 64,
                   .run = kWindow,
                   .count = static_cast<int>(kWindow * std::clamp<int64_t>(lines - line, 0, share)),
                   .a_step = a_step}});
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
  const Scratch scratch(g.threads, SpacedRows<X>::bytes(g.x));
#pragma omp parallel num_threads(g.threads) if (!is_serial(g.threads, 2.0 * g.offsets[g.E] * g.N * g.K))
  {
    SpacedRows<X> spaced(scratch);
    GroupedGemm<X, W, Y> task = g;
#pragma omp for schedule(dynamic, tasks.at_once)
    for (int64_t i = 0; i < tasks.count; ++i) {
      const auto [e, n0, n1, continues] = tasks[i];
      const W* const next = continues ? g.w + e * g.w_expert + n1 * g.w_row : nullptr;
      task.x = spaced.of(g.x, g.offsets[e], g.offsets[e + 1], g.K);
      gemm_nt_columns(isa, task, e, g.offsets[e], g.offsets[e + 1], n0, n1, next);
    }
  }
}

template <class X, class W, class Y>
void gemm_nn_columns(const Kernels& isa, const GroupedGemm<X, W, Y>& g, int64_t e, int64_t r0, int64_t r1,
                     int64_t n0, int64_t n1, Rows<float> y) {
  constexpr int64_t kMostSteps = 128;
  alignas(64) Packed<X> panels[kMostSteps * kGroup], rows_packed[kMostSteps * (kRowChunk + kMaxBlockRows)];
  const W* w = g.w + e * g.w_expert;
  const X* a[kRowChunk];
  float* c[kRowChunk];
  const int64_t rows = r1 - r0;
  for (int64_t i = 0; i < rows; ++i) {
    a[i] = g.x(r0 + i);
    c[i] = y(r0 + i);
    if (g.K == 0 || rows <= kFewRows) std::fill(c[i], c[i] + n1 - n0, 0.0f);
  }
  if (rows <= kFewRows) {  // row by row as W lies: nothing is packed for so little use of it
    for (int64_t k = 0; k < g.K; ++k)
      for (int64_t i = 0; i < rows; ++i)
        static_cast<const RowKernels<W>&>(isa).add_scaled(w + k * g.w_row + n0, widened(a[i][k]), c[i],
                                                          n1 - n0);
    return;
  }
  const RowBlocks blocks(rows, isa.panel_rows);
  const int64_t calls = kGroup / isa.panel * blocks.count;
  const int64_t most_depth = std::min(kMostSteps, kPanelSize / isa.panel) * kStep<X>;
  for (int64_t k = 0; k < g.K; k += most_depth) {
    const int64_t depth = std::min(most_depth, g.K - k), steps = ceil_div(depth, kStep<X>);
    pack_rows(isa, a, blocks, k, depth, rows_packed);
    for (int64_t group = n0; group < n1; group += kGroup) {
      const int64_t columns = std::min(kGroup, n1 - group);
      static_cast<const PackKernels<X, W>&>(isa).pack(
          {.b = w + k * g.w_row + group, .ldb = g.w_row, .K = depth, .columns = columns, .panels = panels});
      // While this group is computed, each call asks for its share of the next one's lines.
      const bool turns = group + kGroup >= n1;
      const int64_t next_k = turns ? k + depth : k, next_n = turns ? n0 : group + kGroup;
      const int64_t lines = ceil_div(std::min(kGroup, n1 - next_n), kLine<W>);
      const int64_t wanted = std::min(most_depth, g.K - next_k), share = ceil_div(wanted, calls);
      const int a_step = asked_a_step(share * lines, steps);
      int64_t row = 0;
      for (int64_t n = 0; n < columns; n += isa.panel)
        for (int64_t i = 0; i < blocks.count; ++i, row += share)
          static_cast<const PanelKernels<X, float>&>(isa).panel_product[blocks.rows(i)](
              {.a = rows_packed + i * steps * isa.panel_rows,
               .b = panels + n * steps,
               .c = c + blocks.first[i],
               .column = group - n0 + n,
               .steps = steps,
               .columns = std::min<int64_t>(isa.panel, columns - n),
               .mode = k > 0 ? Store::kAdd : Store::kWrite,
               .ahead = {.at = row < wanted
                                   ? reinterpret_cast<const char*>(w + (next_k + row) * g.w_row + next_n)
                                   : nullptr,
                         .stride = 64,
                         .next = g.w_row * static_cast<int64_t>(sizeof(W)),
                         .run = static_cast<int>(lines),
                         .count = static_cast<int>(lines * std::clamp<int64_t>(wanted - row, 0, share)),
                         .a_step = a_step}});
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
