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

#include "dispatch.h"

namespace sigma::cpu {
namespace {

constexpr int64_t kColumnBlock =
    64;  // of a forward task: its weights, 64 * K floats, stay in L2 across row chunks
constexpr int64_t kWindow =
    8;  // rows of W fetched ahead together: 1.2x over one at a time (E=96, T=2048, AVX-512)
constexpr int64_t kWidth = 1024;    // columns of a task of grouped_gemm_nn
constexpr int64_t kRowChunk = 128;  // rows of x that stay in L2 while the columns pass
constexpr int64_t kDepth =
    32;  // rows of W per panel: 2.3x over 128 (same shape); the prefetcher follows 32 pages
constexpr int64_t kOuterRows = 256;   // contraction of the weight gradient per pass
constexpr int64_t kLine = 16;         // floats in a cache line
constexpr double kSerialFlops = 1e5;  // below this a parallel region costs more than it saves

bool is_serial(int threads, double flops) { return threads == 1 || flops < kSerialFlops; }

}  // namespace

void gemm_nt_columns(const Kernels& isa, const GroupedGemm& g, int64_t e, int64_t r0, int64_t r1, int64_t n0,
                     int64_t n1) {
  const float* w = g.w + e * g.w_expert;
  for (int64_t chunk = r0; chunk < r1; chunk += kRowChunk) {
    const int64_t rows = std::min(kRowChunk, r1 - chunk), blocks = ceil_div(rows, isa.dot_rows);
    for (int64_t n = n0; n < n1; n += isa.dot_cols) {
      const int64_t cols = std::min<int64_t>(isa.dot_cols, n1 - n);
      // While the groups of one window are computed, each call asks for its share of the next window's lines.
      const int64_t group = (n - n0) / isa.dot_cols, groups = kWindow / isa.dot_cols;
      const int64_t window = n0 + (group / groups + 1) * kWindow, calls = groups * blocks;
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t first = piece(rows, blocks, i), count = piece(rows, blocks, i + 1) - first;
        const float* a[kMaxBlockRows];
        float* c[kMaxBlockRows];
        float scale[kMaxBlockRows];
        for (int64_t m = 0; m < count; ++m) {
          const int64_t r = chunk + first + m;
          a[m] = g.x(r);
          c[m] = g.y(r) + n;
          if (g.scale) scale[m] = g.scale[g.slot_of_row ? g.slot_of_row[r] : r];
        }
        const int64_t call = group % groups * blocks + i;
        const DotBlock block{.a = a,
                             .b = w + n * g.w_row,
                             .ldb = g.w_row,
                             .c = c,
                             .scale = g.scale ? scale : nullptr,
                             .K = g.K,
                             .mode = Store::kWrite,
                             .prefetch = w + window * g.w_row + piece(g.K / kLine, calls, call) * kLine,
                             .prefetch_rows = window + kWindow <= n1 ? static_cast<int>(kWindow) : 0,
                             .prefetch_lines = static_cast<int>(ceil_div(kWindow, calls))};
        isa.dot[count][cols](block);
      }
    }
  }
}

void grouped_gemm_nt(const GroupedGemm& g) {
  const Kernels& isa = kernels();
  const int64_t blocks = ceil_div(g.N, kColumnBlock);
#pragma omp parallel for collapse(2) schedule(dynamic) \
    num_threads(g.threads) if (!is_serial(g.threads, 2.0 * g.offsets[g.E] * g.N * g.K))
  for (int64_t e = 0; e < g.E; ++e)
    for (int64_t i = 0; i < blocks; ++i)
      if (g.offsets[e] < g.offsets[e + 1])
        gemm_nt_columns(isa, g, e, g.offsets[e], g.offsets[e + 1], i * kColumnBlock,
                        std::min(g.N, (i + 1) * kColumnBlock));
}

namespace {

void gemm_nn_columns(const Kernels& isa, const GroupedGemm& g, int64_t e, int64_t r0, int64_t r1, int64_t n0,
                     int64_t n1) {
  alignas(64) float copy[kDepth * 64];
  const float* w = g.w + e * g.w_expert;
  const int64_t rows = r1 - r0, blocks = ceil_div(rows, isa.axpy_rows);
  for (int64_t k = 0; k < g.K; k += kDepth) {
    const int64_t depth = std::min(kDepth, g.K - k);
    for (int64_t n = n0; n < n1; n += isa.panel) {
      const int64_t cols = std::min<int64_t>(isa.panel, n1 - n);
      const int64_t next_lines = ceil_div(std::min<int64_t>(isa.panel, n1 - n - cols), kLine);
      const float* panel = w + k * g.w_row + n;
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t first = piece(rows, blocks, i), count = piece(rows, blocks, i + 1) - first;
        const float* a[kMaxBlockRows];
        float* c[kMaxBlockRows];
        for (int64_t m = 0; m < count; ++m) {
          a[m] = g.x(r0 + first + m) + k;
          c[m] = g.y(r0 + first + m) + n;
        }
        const bool is_packed = i > 0;
        const int64_t line = piece(next_lines, blocks, i);
        const AxpyBlock block{.a = a,
                              .b = is_packed ? copy : panel,
                              .ldb = is_packed ? isa.panel : g.w_row,
                              .copy = !is_packed && blocks > 1 ? copy : nullptr,
                              .c = c,
                              .K = depth,
                              .columns = cols,
                              .mode = k > 0 ? Store::kAdd : Store::kWrite,
                              .prefetch = panel + cols + line * kLine,
                              .prefetch_ld = g.w_row,
                              .prefetch_lines = static_cast<int>(piece(next_lines, blocks, i + 1) - line)};
        isa.axpy[count](block);
      }
    }
  }
}

}  // namespace

void grouped_gemm_nn(const GroupedGemm& g) {
  const Kernels& isa = kernels();
  int64_t most = 0;
  for (int64_t e = 0; e < g.E; ++e) most = std::max<int64_t>(most, g.offsets[e + 1] - g.offsets[e]);
  const int64_t chunks = ceil_div(most, kRowChunk), blocks = ceil_div(g.N, kWidth);
#pragma omp parallel for collapse(3) schedule(dynamic) \
    num_threads(g.threads) if (!is_serial(g.threads, 2.0 * g.offsets[g.E] * g.N * g.K))
  for (int64_t e = 0; e < g.E; ++e)
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t r0 = g.offsets[e] + chunk * kRowChunk;
        const int64_t r1 = std::min<int64_t>(g.offsets[e + 1], r0 + kRowChunk);
        if (r0 < r1) gemm_nn_columns(isa, g, e, r0, r1, i * kWidth, std::min(g.N, (i + 1) * kWidth));
      }
}

namespace {

void outer_rows(const Kernels& isa, const GroupedOuter& g, int64_t e, int64_t m0, int64_t m1, bool streams) {
  float* out = g.out + e * g.out_expert;
  const int64_t r0 = g.offsets[e], r1 = g.offsets[e + 1];
  int64_t chunk = r0;
  do {  // once even without rows: the gradient of an idle expert is zero, not unwritten
    const int64_t rows = std::min(kOuterRows, r1 - chunk);
    const bool adds = g.adds || chunk > r0;
    const Store mode = adds ? Store::kAdd : streams && r1 - r0 <= kOuterRows ? Store::kStream : Store::kWrite;
    const float *a_rows[kOuterRows], *b_rows[kOuterRows], *a[kOuterRows], *b[kOuterRows];
    for (int64_t r = 0; r < rows; ++r) a_rows[r] = g.a(chunk + r), b_rows[r] = g.b(chunk + r);
    for (int64_t m = m0; m < m1; m += isa.axpy_rows) {
      const int64_t count = std::min<int64_t>(isa.axpy_rows, m1 - m);
      for (int64_t r = 0; r < rows; ++r) a[r] = a_rows[r] + m;
      for (int64_t n = 0; n < g.B; n += isa.panel) {
        for (int64_t r = 0; r < rows; ++r) b[r] = b_rows[r] + n;
        isa.outer[count]({.a = a,
                          .b = b,
                          .c = out + m * g.out_row + n,
                          .ldc = g.out_row,
                          .R = rows,
                          .columns = std::min<int64_t>(isa.panel, g.B - n),
                          .mode = mode});
      }
    }
    chunk += kOuterRows;
  } while (chunk < r1);
}

}  // namespace

void grouped_outer(const GroupedOuter& g) {
  const Kernels& isa = kernels();
  const int64_t height = 8 * isa.axpy_rows, blocks = ceil_div(g.A, height);
  const int64_t misaligned =
      reinterpret_cast<uintptr_t>(g.out) % 64 + g.out_row % kLine + g.out_expert % kLine + g.B % kLine;
  const bool streams = misaligned == 0;
#pragma omp parallel num_threads( \
        g.threads) if (!is_serial(g.threads, 2.0 * g.offsets[g.E] * g.A * g.B + g.E * g.A * g.B))
  {
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t e = 0; e < g.E; ++e)
      for (int64_t i = 0; i < blocks; ++i)
        if (!g.adds || g.offsets[e] < g.offsets[e + 1])
          outer_rows(isa, g, e, i * height, std::min(g.A, (i + 1) * height), streams);
    std::atomic_thread_fence(std::memory_order_seq_cst);  // streaming stores are weakly ordered
  }
}

}  // namespace sigma::cpu
