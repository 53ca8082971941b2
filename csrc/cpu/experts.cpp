// The expert layer as a sequence of grouped GEMMs.
//
// Tokens are gathered as the GEMM reads its rows and scattered as it writes them, so no permuted copy exists.
// For top-1 the routing weight is a factor in the last epilogue and there is no combine pass. Saved for
// backward: gate_up [R, 2I].  The output before weighting is not: the gradient of a routing weight is
// <grad_out, W_down h> = <W_down^T grad_out, h>, and W_down^T grad_out is needed anyway.
#include "experts.h"

#include <algorithm>

#include "dispatch.h"
#include "grouped_gemm.h"
#include "permute.h"

namespace sigma::cpu {
namespace {

constexpr int64_t kColumnBlock = 64;  // of gate and of up, whose SwiGLU is taken while both are in cache

template <class W>
Rows<const float> by_token(const Experts<W>& m, const float* base, int64_t ld) {
  return {base, ld, m.row_map, m.k};
}

// Output rows of a GEMM that ends a pass: straight to the token for k = 1, to the slot otherwise.
template <class W>
Rows<float> to_token_or_slot(const Experts<W>& m, float* out, float* by_slot) {
  return m.k == 1 ? Rows<float>{out, m.H, m.row_map, 1} : Rows<float>{by_slot, m.H, m.row_map, 1};
}

template <class W>
void sum_slots(const Experts<W>& m, const float* by_slot, float* out) {
  if (m.k > 1)
    combine({.T = m.T,
             .H = m.H,
             .k = m.k,
             .y = by_slot,
             .ldy = m.H,
             .row_of_slot = nullptr,
             .weights = nullptr,
             .out = out,
             .threads = m.threads});
}

template <class W>
void gate_up_and_swiglu(const Experts<W>& m, float* hidden) {
  const Kernels& isa = kernels();
  const GroupedGemm<W> g{.E = m.E,
                         .N = 2 * m.I,
                         .K = m.H,
                         .offsets = m.offsets,
                         .x = by_token(m, m.x, m.ldx),
                         .w = m.gate_up_proj,
                         .w_expert = m.gate_up_expert,
                         .w_row = m.gate_up_row,
                         .y = {m.gate_up, 2 * m.I},
                         .scale = nullptr,
                         .slot_of_row = nullptr,
                         .threads = m.threads};
  const int64_t blocks = ceil_div(m.I, kColumnBlock);
#pragma omp parallel for collapse(2) schedule(dynamic) \
    num_threads(m.threads) if (m.T * m.k * m.I * m.H > (1 << 15))
  for (int64_t e = 0; e < m.E; ++e)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t r0 = m.offsets[e], r1 = m.offsets[e + 1];
      if (r0 == r1) continue;
      const int64_t i0 = b * kColumnBlock, i1 = std::min(m.I, i0 + kColumnBlock);
      gemm_nt_columns(isa, g, e, r0, r1, i0, i1);
      gemm_nt_columns(isa, g, e, r0, r1, m.I + i0, m.I + i1);
      for (int64_t r = r0; r < r1; ++r) {
        const float* gate = m.gate_up + r * 2 * m.I + i0;
        isa.swiglu(gate, gate + m.I, hidden + r * m.I + i0, i1 - i0);
      }
    }
}

}  // namespace

template <class W>
void experts_forward(const Experts<W>& m, const ExpertsForward& f) {
  gate_up_and_swiglu(m, f.hidden);
  grouped_gemm_nt(GroupedGemm<W>{.E = m.E,
                                 .N = m.H,
                                 .K = m.I,
                                 .offsets = m.offsets,
                                 .x = {f.hidden, m.I},
                                 .w = m.down_proj,
                                 .w_expert = m.down_expert,
                                 .w_row = m.down_row,
                                 .y = to_token_or_slot(m, f.out, f.by_slot),
                                 .scale = m.weights,
                                 .slot_of_row = m.row_map,
                                 .threads = m.threads});
  sum_slots(m, f.by_slot, f.out);
}

template <class W>
void experts_backward(const Experts<W>& m, const ExpertsBackward<W>& b) {
  const Kernels& isa = kernels();
  const int64_t R = m.T * m.k;
  grouped_gemm_nn(GroupedGemm<W>{.E = m.E,
                                 .N = m.I,
                                 .K = m.H,
                                 .offsets = m.offsets,
                                 .x = by_token(m, b.grad_out, b.ld_grad),
                                 .w = m.down_proj,
                                 .w_expert = m.down_expert,
                                 .w_row = m.down_row,
                                 .y = {b.hidden, m.I},
                                 .scale = nullptr,
                                 .slot_of_row = nullptr,
                                 .threads = m.threads});
#pragma omp parallel for schedule(static) num_threads(m.threads) if (R * m.I > (1 << 12))
  for (int64_t r = 0; r < R; ++r) {
    const int32_t s = m.row_map[r];
    const float* gate = m.gate_up + r * 2 * m.I;
    float *grad_gate = b.grad_gate_up + r * 2 * m.I, *hidden = b.hidden + r * m.I;
    b.grad_weights[s] =
        isa.swiglu_backward(hidden, gate, gate + m.I, m.weights[s], grad_gate, grad_gate + m.I, hidden, m.I);
  }
  if (b.grad_x) {
    grouped_gemm_nn(GroupedGemm<W>{.E = m.E,
                                   .N = m.H,
                                   .K = 2 * m.I,
                                   .offsets = m.offsets,
                                   .x = {b.grad_gate_up, 2 * m.I},
                                   .w = m.gate_up_proj,
                                   .w_expert = m.gate_up_expert,
                                   .w_row = m.gate_up_row,
                                   .y = to_token_or_slot(m, b.grad_x, b.by_slot),
                                   .scale = nullptr,
                                   .slot_of_row = nullptr,
                                   .threads = m.threads});
    sum_slots(m, b.by_slot, b.grad_x);
  }
  if (b.grad_gate_up_proj)
    grouped_outer(GroupedOuter<W>{.E = m.E,
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
    grouped_outer(GroupedOuter<W>{.E = m.E,
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

template void experts_forward(const Experts<float>&, const ExpertsForward&);
template void experts_forward(const Experts<Bf16>&, const ExpertsForward&);
template void experts_backward(const Experts<float>&, const ExpertsBackward<float>&);
template void experts_backward(const Experts<Bf16>&, const ExpertsBackward<Bf16>&);

}  // namespace sigma::cpu
