// out = silu(gate) * up, forward and backward, a row at a time.  Bound: bytes (3 and 6 floats an element).
#pragma once

#include "vec.h"

namespace sigma::SK_NS {

inline void swiglu_row(const float* gate, const float* up, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec g = load(gate + i);
    store(out + i, g * sigmoid(g) * load(up + i));
  }
  if (i < n) {
    const Vec g = load_partial(gate + i, n - i);
    store_partial(out + i, g * sigmoid(g) * load_partial(up + i, n - i), n - i);
  }
}

// With s = sigmoid(g): d silu/dg = s + g s (1 - s).  grad_out is the gradient before `factor` was applied.
SK_INLINE Vec swiglu_backward_step(Vec d, Vec g, Vec u, float factor, Vec* dg, Vec* du, Vec* h) {
  const Vec s = sigmoid(g), silu = g * s, scaled = d * factor;
  *dg = scaled * u * (s + silu * (1.0f - s));
  *du = scaled * silu;
  *h = silu * u;
  return d * *h;
}

inline float swiglu_backward_row(const float* grad_out, const float* gate, const float* up, float factor,
                                 float* grad_gate, float* grad_up, float* scaled_out, int64_t n) {
  Vec sum{}, dg, du, h;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    sum += swiglu_backward_step(load(grad_out + i), load(gate + i), load(up + i), factor, &dg, &du, &h);
    store(grad_gate + i, dg);
    store(grad_up + i, du);
    if (scaled_out) store(scaled_out + i, h * factor);
  }
  if (i < n) {
    const int64_t left = n - i;
    sum += swiglu_backward_step(load_partial(grad_out + i, left), load_partial(gate + i, left),
                                load_partial(up + i, left), factor, &dg, &du, &h);
    store_partial(grad_gate + i, dg, left);
    store_partial(grad_up + i, du, left);
    if (scaled_out) store_partial(scaled_out + i, h * factor, left);
  }
  return add_lanes(sum);
}

}  // namespace sigma::SK_NS
