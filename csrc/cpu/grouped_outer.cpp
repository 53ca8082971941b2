// Blocking and schedule of the weight gradient: for each expert the sum over its rows of outer products.
//
// A task is some rows of one expert's result.  It packs what it contracts over: rows of a model are whole
// pages apart, so that where they lie they would share a set of the first cache and a page each, and every
// block reads them again. Each element is summed by one task in the order of the rows, so bits do not depend
// on threads or on how tall a task is.
//
// Bound at E=96, T=2048, top-1: 42 FLOPs for 4 bytes written, which is about what a core computes in the
// time; the result goes past the caches.
#include <algorithm>
#include <atomic>
#include <type_traits>

#include "dispatch.h"
#include "grouped_gemm.h"
#include "scratch.h"

namespace sigma::cpu {
namespace {

constexpr int64_t kOuterRows = 256;  // contraction per pass
constexpr int64_t kAheadPanels = 8;  // of a row of the result, between asking for a line and its sums
constexpr int64_t kCached = int64_t{8} << 20;  // bytes of a result that a cache may still hold
constexpr int64_t kTall = 40,
                  kShort = 8;  // blocks of rows of the result in a task: what packing b costs is shared

// Columns c0..c1 of rows r0..r0+rows in panels [steps, width], one after another, the last filled up with
// zeros.  A step is a row, or for bf16 a pair of rows.
template <class X>
void pack(const Kernels& isa, const Rows<const X>& x, int64_t r0, int64_t rows, int64_t c0, int64_t c1,
          int64_t width, Packed<X>* out) {
  constexpr int64_t kPiece = 256;
  const int64_t steps = ceil_div(rows, kStep<X>);
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t r = r0 + i * kStep<X>;
    const X* const even = x(r);
    [[maybe_unused]] const X* const odd = r + 1 < r0 + rows ? x(r + 1) : nullptr;
    Packed<X>* panel = out + i * width;
    for (int64_t c = c0; c < c1; c += kPiece / width * width) {
      const int64_t end = std::min(c1, c + kPiece / width * width);
      alignas(64) Packed<X> pairs[kStep<X> == 2 ? kPiece : 1];
      const Packed<X>* from = pairs;
      if constexpr (kStep<X> == 2)
        isa.pair_rows(even + c, odd ? odd + c : nullptr, pairs, end - c);
      else
        from = even + c;
      for (int64_t n = c; n < end; n += width, panel += steps * width, from += width) {
        const int64_t filled = std::min(width, end - n);
        for (int64_t j = 0; j < filled; ++j) panel[j] = from[j];
        for (int64_t j = filled; j < width; ++j) panel[j] = {};
      }
    }
  }
}

// What a task packs, in elements of four bytes.
template <class X>
struct Panels {
  Panels(const Kernels& isa, int64_t rows, int64_t A, int64_t B)
      : steps(ceil_div(std::min(rows, kOuterRows), kStep<X>)),
        of_a(steps * ceil_div(A, isa.panel_rows) * isa.panel_rows),
        of_b(steps * ceil_div(B, isa.panel) * isa.panel) {}
  int64_t steps, of_a, of_b;
};

// Rows m0..m1 of one expert's gradient, written to or added to c, rows of it that lie in order.
template <class X, class W, class C>
void outer_rows(const Kernels& isa, const GroupedOuter<X, W>& g, int64_t e, int64_t m0, int64_t m1,
                Rows<C> out, bool adds, bool streams, Packed<X>* copies) {
  const int64_t r0 = g.offsets[e], r1 = g.offsets[e + 1];
  C* c[kTall * kMaxBlockRows];
  for (int64_t m = m0; m < m1; ++m) c[m - m0] = out(m - m0);
  int64_t chunk = r0;
  do {  // once even without rows: the gradient of an idle expert is zero, not unwritten
    const int64_t rows = std::min(kOuterRows, r1 - chunk), steps = ceil_div(rows, kStep<X>);
    const Store mode = adds || chunk > r0                 ? Store::kAdd
                       : streams && r1 - r0 <= kOuterRows ? Store::kStream
                                                          : Store::kWrite;
    // What is added to comes from memory, 64 bytes of each row at a time.
    const bool asks = mode == Store::kAdd && g.E * g.A * g.B * int64_t{sizeof(W)} > kCached;
    Packed<X>* const a = copies + Panels<X>(isa, rows, m1 - m0, g.B).of_b;
    pack(isa, g.a, chunk, rows, m0, m1, isa.panel_rows, a);
    pack(isa, g.b, chunk, rows, 0, g.B, isa.panel, copies);
    const int64_t panels = ceil_div(g.B, isa.panel), lines_a_row = ceil_div(isa.panel, kLine<C>);
    const int a_step = asked_a_step(isa.panel_rows * lines_a_row, steps);
    const auto rows_at = [&](int64_t m) { return std::clamp<int64_t>(m1 - m0 - m, 0, isa.panel_rows); };
    PanelBlock<X, C> block{
        .a = a, .b = copies, .c = c, .column = 0, .steps = steps, .columns = 0, .mode = mode};
    block.ahead = {.stride = out.ld * static_cast<int64_t>(sizeof(C)), .next = 64, .a_step = a_step};
    for (int64_t m = 0; m < m1 - m0; m += isa.panel_rows) {
      const auto product = static_cast<const PanelKernels<X, C>&>(isa).panel_product[rows_at(m)];
      block.a = a + m * steps;
      block.c = c + m;
      for (int64_t i = 0; i < panels; ++i) {
        block.b = copies + i * isa.panel * steps;
        block.column = i * isa.panel;
        block.columns = std::min<int64_t>(isa.panel, g.B - block.column);
        if (asks) {
          const bool turns = i + kAheadPanels >= panels;
          const int64_t next_m = turns ? m + isa.panel_rows : m;
          const int64_t next_i = i + kAheadPanels - (turns ? panels : 0);
          const int64_t wanted = next_i < panels ? rows_at(next_m) : 0;
          if (wanted) block.ahead.at = reinterpret_cast<const char*>(c[next_m] + next_i * isa.panel);
          block.ahead.run = static_cast<int>(wanted);
          block.ahead.count = static_cast<int>(wanted * lines_a_row);
        }
        product(block);
      }
    }
    chunk += kOuterRows;
  } while (chunk < r1);
}

// A narrow gradient of an expert with many rows is summed in f32 and rounded once, as one with few rows is.
template <class X, class W>
void outer_rows_rounded_once(const Kernels& isa, const GroupedOuter<X, W>& g, int64_t e, int64_t m0,
                             int64_t m1, float* sum, Packed<X>* copies) {
  W* const out = g.out + e * g.out_expert;
  for (int64_t m = m0; g.adds && m < m1; ++m)
    static_cast<const RowKernels<W>&>(isa).widen(out + m * g.out_row, sum + (m - m0) * g.B, g.B);
  outer_rows(isa, g, e, m0, m1, Rows<float>{.base = sum, .ld = g.B}, g.adds, false, copies);
  for (int64_t m = m0; m < m1; ++m)
    static_cast<const RowKernels<W>&>(isa).narrow(sum + (m - m0) * g.B, out + m * g.out_row, g.B);
}

}  // namespace

template <class X, class W>
void grouped_outer(const GroupedOuter<X, W>& g) {
  const Kernels& isa = kernels();
  int64_t height = kTall * isa.panel_rows;
  while (height > kShort * isa.panel_rows && g.E * ceil_div(g.A, height) < 8 * g.threads)
    height -= kShort * isa.panel_rows;
  const int64_t blocks = ceil_div(g.A, height);
  const int64_t misaligned = reinterpret_cast<uintptr_t>(g.out) % 64 + g.out_row % kLine<W> +
                             g.out_expert % kLine<W> + g.B % kLine<W>;
  const bool streams = misaligned == 0;
  int64_t most = 0;
  for (int64_t e = 0; e < g.E; ++e) most = std::max<int64_t>(most, g.offsets[e + 1] - g.offsets[e]);
  const bool has_sums = !std::is_same_v<W, float> && most > kOuterRows;
  const int64_t tall = std::min(height, g.A), sum_floats = has_sums ? ceil_div(tall * g.B, 16) * 16 : 0;
  const Panels<X> panels(isa, most, tall, g.B);
  const Scratch scratch(g.threads, (sum_floats + panels.of_a + panels.of_b) * 4);
#pragma omp parallel num_threads( \
        g.threads) if (!is_serial(g.threads, 2.0 * g.offsets[g.E] * g.A * g.B + g.E * g.A * g.B))
  {
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t e = 0; e < g.E; ++e)
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t rows = g.offsets[e + 1] - g.offsets[e];
        const int64_t m0 = i * height, m1 = std::min(g.A, m0 + height);
        if (g.adds && rows == 0) continue;
        Packed<X>* const copies = scratch.mine<Packed<X>>(sum_floats);
        if constexpr (!std::is_same_v<W, float>) {
          if (rows > kOuterRows) {
            outer_rows_rounded_once(isa, g, e, m0, m1, scratch.mine<float>(), copies);
            continue;
          }
        }
        outer_rows(isa, g, e, m0, m1,
                   Rows<W>{.base = g.out + e * g.out_expert + m0 * g.out_row, .ld = g.out_row}, g.adds,
                   streams, copies);
      }
    std::atomic_thread_fence(std::memory_order_seq_cst);  // streaming stores are weakly ordered
  }
}

template void grouped_outer(const GroupedOuter<float, float>&);
template void grouped_outer(const GroupedOuter<float, Bf16>&);
template void grouped_outer(const GroupedOuter<float, F16>&);
template void grouped_outer(const GroupedOuter<Bf16, Bf16>&);
template void grouped_outer(const GroupedOuter<Bf16, float>&);

}  // namespace sigma::cpu
