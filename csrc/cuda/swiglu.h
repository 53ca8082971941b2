// The activation between the two products of an expert, and its gradient.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sigma::cuda {

// hidden[r, i] = silu(gate[r, i]) * up[r, i], the gate being the first half of a row of gate_up.  Bf16 and
// F16.
template <class T>
struct Swiglu {
  int64_t R, I;
  const T* gate_up;  // [R, 2I]
  T* hidden;         // [R, I]
};
template <class T>
cudaError_t swiglu(const Swiglu<T>& s, cudaStream_t stream);

// The gradient where row r of the second product was multiplied by w = weights[slot_of_row[r]].  grad_hidden
// is that of the activation without w; with it and w come
//   grad_weights[slot] = <grad_hidden[r], hidden[r]>, since <g, D h> = <D^T g, h> needs no output of the
//   product, grad_gate_up[r] from w * grad_hidden[r], and weighted[r] = w * hidden[r], of which D's gradient
//   is made.
template <class T>
struct SwigluBackward {
  int64_t R, I;
  const T* gate_up;      // [R, 2I]
  const T* grad_hidden;  // [R, I]
  const float* weights;
  const int32_t* slot_of_row;
  T* grad_gate_up;      // [R, 2I]
  T* weighted;          // [R, I]
  float* grad_weights;  // by slot
};
template <class T>
cudaError_t swiglu_backward(const SwigluBackward<T>& s, cudaStream_t stream);

}  // namespace sigma::cuda
