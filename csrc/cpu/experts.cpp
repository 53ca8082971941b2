// The expert layer as a sequence of grouped GEMMs.
//
// Tokens are gathered as the GEMM reads its rows and scattered as it writes them, so no permuted copy of all
// exists, but of one expert's (spaced_rows.h).
// For top-1 the routing weight is a factor in the last epilogue and there is no combine pass. Saved for
// backward: gate_up [R, 2I].  The output before weighting is not: the gradient of a routing weight is
// <grad_out, W_down h> = <W_down^T grad_out, h>, and W_down^T grad_out is needed anyway.  SwiGLU is taken
// where a GEMM leaves its rows in cache: forward after gate and up, backward after W_down^T grad_out.
#include "experts.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "grouped_gemm.h"
#include "permute.h"
#include "route.h"
#include "scratch.h"
#include "spaced_rows.h"

namespace sigma::cpu {
namespace {

template <class X, class W>
Rows<const X> by_token(const Experts<X, W>& m, const X* base, int64_t ld) {
  return {base, ld, m.row_map, m.k};
}

// A GEMM that ends a pass: rows go straight to their token for k = 1; else to their slot, and then are added
// up.  Where slots have no row, rows stay in their order and are found by it.
template <class X, class W, class Gemm>
void to_tokens(const Experts<X, W>& m, GroupedGemm<X, W, X> g, float* by_slot, X* out, Gemm gemm) {
  if (m.k == 1) {
    g.y = {out, m.H, m.row_map};
    gemm(g);
    for (int64_t t = 0; m.row_of_slot && t < m.T; ++t)
      if (m.row_of_slot[t] < 0) std::memset(out + t * m.H, 0, m.H * sizeof(X));
    return;
  }
  gemm(GroupedGemm<X, W, float>{.E = g.E,
                                .N = g.N,
                                .K = g.K,
                                .offsets = g.offsets,
                                .x = g.x,
                                .w = g.w,
                                .w_expert = g.w_expert,
                                .w_row = g.w_row,
                                .y = {by_slot, m.H, m.row_of_slot ? nullptr : m.row_map},
                                .scale = g.scale,
                                .slot_of_row = g.slot_of_row,
                                .threads = g.threads,
                                .column_scale = g.column_scale});
  combine(Combine<float, X>{.T = m.T,
                            .H = m.H,
                            .k = m.k,
                            .y = by_slot,
                            .ldy = m.H,
                            .row_of_slot = m.row_of_slot,
                            .weights = nullptr,
                            .out = out,
                            .threads = m.threads});
}

template <class X>
void swiglu_row(const Kernels& isa, const float* gate, const float* up, X* out, int64_t columns) {
  if constexpr (std::is_same_v<X, float>) {
    isa.swiglu(gate, up, out, columns);
  } else {
    alignas(64) float row[kColumnBlock];
    isa.swiglu(gate, up, row, columns);
    static_cast<const RowKernels<X>&>(isa).narrow(row, out, columns);
  }
}

// Columns i0..i1 of gate and of up for one expert's rows, and their SwiGLU; `next` as in gemm_nt_columns.
template <class X, class W>
void gate_up_columns(const Kernels& isa, const Experts<X, W>& m, int64_t e, int64_t i0, int64_t i1,
                     SpacedRows<X>& spaced, X* hidden, const W* next) {
  alignas(64) float tile[kRowChunk * 2 * kColumnBlock];  // where no backward wants them
  const int64_t columns = i1 - i0, end = m.offsets[e + 1];
  for (int64_t r0 = m.offsets[e]; r0 < end; r0 += kRowChunk) {
    const int64_t r1 = std::min(end, r0 + kRowChunk);
    const Rows<const X> x = spaced.of(by_token(m, m.x, m.ldx), r0, r1, m.H);
    const auto half = [&](int64_t n0, int64_t in_tile, const W* ahead) {
      const float* const factors = m.gate_up_scale ? m.gate_up_scale + n0 : nullptr;
      const Rows<float> y = m.gate_up
                                ? Rows<float>{.base = m.gate_up + n0, .ld = 2 * m.I}
                                : Rows<float>{.base = tile + in_tile, .ld = 2 * kColumnBlock, .first = r0};
      const GroupedGemm<X, W, float> g{.E = m.E,
                                       .N = 2 * m.I,
                                       .K = m.H,
                                       .offsets = m.offsets,
                                       .x = x,
                                       .w = m.gate_up_proj + n0 * m.gate_up_row,
                                       .w_expert = m.gate_up_expert,
                                       .w_row = m.gate_up_row,
                                       .y = y,
                                       .scale = nullptr,
                                       .slot_of_row = nullptr,
                                       .threads = m.threads,
                                       .column_scale = factors};
      gemm_nt_columns(isa, g, e, r0, r1, 0, columns, ahead);
      return y;
    };
    const W* const up = m.gate_up_proj + e * m.gate_up_expert + (m.I + i0) * m.gate_up_row;
    const Rows<float> gates = half(i0, 0, up);
    const Rows<float> ups = half(m.I + i0, kColumnBlock, r1 == end ? next : nullptr);
    for (int64_t r = r0; r < r1; ++r) swiglu_row(isa, gates(r), ups(r), hidden + r * m.I + i0, columns);
  }
}

template <class X, class W>
void gate_up_and_swiglu(const Experts<X, W>& m, X* hidden) {
  const Kernels& isa = kernels();
  const ColumnTasks tasks(m.E, m.offsets, m.I, m.threads);
  const Scratch scratch(m.threads, SpacedRows<X>::bytes(by_token(m, m.x, m.ldx)));
#pragma omp parallel num_threads(m.threads) if (m.T * m.k * m.I * m.H > (1 << 15))
  {
    SpacedRows<X> spaced(scratch);
#pragma omp for schedule(dynamic, tasks.at_once)
    for (int64_t i = 0; i < tasks.count; ++i) {
      const auto [e, i0, i1, continues] = tasks[i];
      const W* const next = continues ? m.gate_up_proj + e * m.gate_up_expert + i1 * m.gate_up_row : nullptr;
      gate_up_columns(isa, m, e, i0, i1, spaced, hidden, next);
    }
  }
}

// hidden = W_down^T grad_out, and from it, a row at a time: grad_gate_up, grad_weights, and in hidden's place
// the weighted activation, which the gradient of W_down is made of.
template <class X, class W, class G>
void down_and_swiglu_backward(const Experts<X, W>& m, const ExpertsBackward<X, W, G>& b) {
  const Kernels& isa = kernels();
  const GroupedGemm<X, W, float> g{.E = m.E,
                                   .N = m.I,
                                   .K = m.H,
                                   .offsets = m.offsets,
                                   .x = by_token(m, b.grad_out, b.ld_grad),
                                   .w = m.down_proj,
                                   .w_expert = m.down_expert,
                                   .w_row = m.down_row,
                                   .y = {},
                                   .scale = nullptr,
                                   .slot_of_row = nullptr,
                                   .threads = m.threads};
  int64_t most = 0;
  for (int64_t e = 0; e < m.E; ++e) most = std::max<int64_t>(most, m.offsets[e + 1] - m.offsets[e]);
  const int64_t chunks = ceil_div(most, kRowChunk);
  // Sums of a chunk's rows, and for bf16 one row more of each result, which is rounded as it is stored.
  const Scratch scratch(m.threads, (std::min(most, kRowChunk) + 3) * m.I * 4);
#pragma omp parallel for collapse(2) schedule(dynamic) \
    num_threads(m.threads) if (m.T * m.k * m.I * m.H > (1 << 15))
  for (int64_t e = 0; e < m.E; ++e)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t r0 = m.offsets[e] + chunk * kRowChunk;
      const int64_t r1 = std::min<int64_t>(m.offsets[e + 1], r0 + kRowChunk);
      if (r0 >= r1) continue;
      float* const sums = scratch.mine<float>();
      const Rows<float> grad_hidden{.base = sums, .ld = m.I, .first = r0};
      float* const row = sums + (r1 - r0) * m.I;
      gemm_nn_columns(isa, g, e, r0, r1, 0, m.I, grad_hidden);
      for (int64_t r = r0; r < r1; ++r) {
        const int32_t s = m.row_map[r];
        const float* gate = m.gate_up + r * 2 * m.I;
        X *const grad_gate = b.grad_gate_up + r * 2 * m.I, *const hidden = b.hidden + r * m.I;
        if constexpr (std::is_same_v<X, float>) {
          b.grad_weights[s] = isa.swiglu_backward(grad_hidden(r), gate, gate + m.I, m.weights[s], grad_gate,
                                                  grad_gate + m.I, hidden, m.I);
        } else {
          b.grad_weights[s] = isa.swiglu_backward(grad_hidden(r), gate, gate + m.I, m.weights[s], row,
                                                  row + m.I, row + 2 * m.I, m.I);
          static_cast<const RowKernels<X>&>(isa).narrow(row, grad_gate, 2 * m.I);
          static_cast<const RowKernels<X>&>(isa).narrow(row + 2 * m.I, hidden, m.I);
        }
      }
    }
}

}  // namespace

template <class X, class W>
void experts_forward(const Experts<X, W>& m, const ExpertsForward<X>& f) {
  gate_up_and_swiglu(m, f.hidden);
  to_tokens(m,
            GroupedGemm<X, W, X>{.E = m.E,
                                 .N = m.H,
                                 .K = m.I,
                                 .offsets = m.offsets,
                                 .x = {f.hidden, m.I},
                                 .w = m.down_proj,
                                 .w_expert = m.down_expert,
                                 .w_row = m.down_row,
                                 .y = {},
                                 .scale = m.weights,
                                 .slot_of_row = m.row_map,
                                 .threads = m.threads,
                                 .column_scale = m.down_scale},
            f.by_slot, f.out, [](const auto& g) { grouped_gemm_nt(g); });
}

template <class X, class W, class Index>
int64_t experts_inference(Experts<X, W> m, const Index* indices, const RoutingWeight<W>* weights, X* out) {
  const int64_t R = m.T * m.k;
  std::vector<int32_t> counts(m.E), offsets(m.E + 1), row_map(R);
  const int64_t wrong =
      group_by_expert(indices, R, m.E, counts.data(), offsets.data(), row_map.data(), m.threads);
  if (wrong >= 0) return wrong;
  const Buffer wide(R * sizeof(float));
  static_cast<const RowKernels<RoutingWeight<W>>&>(kernels()).widen(weights, wide.as<float>(), R);
  m.weights = wide.as<float>();
  m.offsets = offsets.data();
  m.row_map = row_map.data();
  m.gate_up = nullptr;
  const Buffer hidden(R * m.I * sizeof(X)), by_slot(m.k > 1 ? R * m.H * sizeof(float) : 0);
  experts_forward(m, {.hidden = hidden.as<X>(), .by_slot = by_slot.as<float>(), .out = out});
  return -1;
}

template <class X, class W, class G>
void experts_backward(const Experts<X, W>& m, const ExpertsBackward<X, W, G>& b) {
  down_and_swiglu_backward(m, b);
  for (int64_t s = 0; m.row_of_slot && s < m.T * m.k; ++s)
    if (m.row_of_slot[s] < 0) b.grad_weights[s] = 0.0f;
  if (b.grad_x)
    to_tokens(m,
              GroupedGemm<X, W, X>{.E = m.E,
                                   .N = m.H,
                                   .K = 2 * m.I,
                                   .offsets = m.offsets,
                                   .x = {b.grad_gate_up, 2 * m.I},
                                   .w = m.gate_up_proj,
                                   .w_expert = m.gate_up_expert,
                                   .w_row = m.gate_up_row,
                                   .y = {},
                                   .scale = nullptr,
                                   .slot_of_row = nullptr,
                                   .threads = m.threads},
              b.by_slot, b.grad_x, [](const auto& g) { grouped_gemm_nn(g); });
  if (b.grad_gate_up_proj)
    grouped_outer(GroupedOuter<X, G>{.E = m.E,
                                     .A = 2 * m.I,
                                     .B = m.H,
                                     .offsets = m.offsets,
                                     .a = {b.grad_gate_up, 2 * m.I},
                                     .b = by_token(m, m.x, m.ldx),
                                     .out = b.grad_gate_up_proj,
                                     .out_expert = 2 * m.I * m.H,
                                     .out_row = m.H,
                                     .adds = b.adds,
                                     .threads = m.threads});
  if (b.grad_down_proj)
    grouped_outer(GroupedOuter<X, G>{.E = m.E,
                                     .A = m.H,
                                     .B = m.I,
                                     .offsets = m.offsets,
                                     .a = by_token(m, b.grad_out, b.ld_grad),
                                     .b = {b.hidden, m.I},
                                     .out = b.grad_down_proj,
                                     .out_expert = m.H * m.I,
                                     .out_row = m.I,
                                     .adds = b.adds,
                                     .threads = m.threads});
}

#define SK_FORWARD(X, W)                                                                     \
  template void experts_forward(const Experts<X, W>&, const ExpertsForward<X>&);             \
  template int64_t experts_inference(Experts<X, W>, const int32_t*, const RoutingWeight<W>*, \
                                     std::add_pointer_t<X>);                                 \
  template int64_t experts_inference(Experts<X, W>, const int64_t*, const RoutingWeight<W>*, \
                                     std::add_pointer_t<X>);
#define SK_BACKWARD(X, W, G) \
  template void experts_backward(const Experts<X, W>&, const ExpertsBackward<X, W, G>&);
SK_FORWARD(float, float)
SK_BACKWARD(float, float, float)
SK_FORWARD(float, Bf16)
SK_BACKWARD(float, Bf16, Bf16)
SK_BACKWARD(float, Bf16, float)
SK_FORWARD(float, F16)
SK_BACKWARD(float, F16, F16)
SK_BACKWARD(float, F16, float)
SK_FORWARD(Bf16, Bf16)
SK_BACKWARD(Bf16, Bf16, Bf16)
SK_BACKWARD(Bf16, Bf16, float)
SK_FORWARD(float, Int8)
#undef SK_BACKWARD
#undef SK_FORWARD

}  // namespace sigma::cpu
