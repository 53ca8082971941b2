// The expert layer: gate and up projection, SwiGLU, down projection, weighted sum; and its gradient.
#pragma once

#include <cstdint>
#include <type_traits>

#include "isa/kernels.h"

namespace sigma::cpu {

// What forward and backward share.  Rows r are in expert order, row_map[r] is the slot t*k + j of row r.
// R = offsets[E] may be less than T*k: a slot without a row is answered by no expert, and adds nothing.
// X: how activations are stored, which decides the arithmetic; W: the experts' weights.
// There are <float, float>, <float, Bf16>, <float, F16> and <Bf16, Bf16> (isa/kernels.h), and <float, Int8>
// forward.
template <class X = float, class W = X>
struct Experts {
  int64_t T, H, I, E;
  int k;
  const X* x;  // [T, H], ldx apart
  int64_t ldx;
  const int32_t *offsets, *row_map;
  const float* weights;   // [T, k] contiguous
  const W* gate_up_proj;  // [E, 2I, H]
  int64_t gate_up_expert, gate_up_row;
  const W* down_proj;  // [E, H, I]
  int64_t down_expert, down_row;
  float* gate_up;  // [R, 2I]: before the activation; forward writes it, backward reads it; null: not kept
  int threads;
  const float* gate_up_scale = nullptr;  // [E, 2I] and [E, H]: factors of the output channels, or null;
  const float* down_scale = nullptr;     // forward alone
  const int32_t* row_of_slot = nullptr;  // [T*k], -1 where a slot has no row; null where each has one
};

template <class X>
struct ExpertsForward {
  X* hidden;       // [R, I] scratch
  float* by_slot;  // [R, H] scratch, only for k > 1
  X* out;          // [T, H]
};
template <class X, class W>
void experts_forward(const Experts<X, W>& m, const ExpertsForward<X>& f);

// How routing weights are stored beside the experts' weights.
template <class W>
using RoutingWeight = std::conditional_t<std::is_same_v<W, Int8>, float, W>;

// Forward from the choice itself, for calls that nobody differentiates: m without offsets, row_map, weights
// and gate_up.  Returns the first slot t*k + j whose index [T, k] is out of range, or -1; then nothing has
// been written.
template <class X, class W, class Index>
int64_t experts_inference(Experts<X, W> m, const Index* indices, const RoutingWeight<W>* weights, X* out);

// G: how the weights' gradients are stored, W or float.
template <class X = float, class W = X, class G = W>
struct ExpertsBackward {
  const X* grad_out;  // [T, H], ld_grad apart
  int64_t ld_grad;
  X* grad_gate_up;       // [R, 2I] scratch
  X* hidden;             // [R, I] scratch
  float* by_slot;        // [R, H] scratch, only for k > 1
  float* grad_weights;   // [T, k]
  X* grad_x;             // [T, H], or null
  G* grad_gate_up_proj;  // contiguous, or null
  G* grad_down_proj;     // contiguous, or null
  bool adds;             // to the two weight gradients
};
template <class X, class W, class G>
void experts_backward(const Experts<X, W>& m, const ExpertsBackward<X, W, G>& b);

}  // namespace sigma::cpu
