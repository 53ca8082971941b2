// What balance losses read of the scores beside the choice: sums over the tokens, and their gradient.
//
// q = softmax(logits), or sigmoids divided by their sum; z = log sum exp logits.
#pragma once

#include "route.h"
#include "route_row.cuh"

namespace sigma::cuda {

// z from the row's largest and its sum_exp(max).  Where the largest is infinite so is z, and not NaN.
template <int N>
__device__ float log_sum_exp(const LogitRow<N>& row, float max, float exps) {
  return fabsf(max) == kInfinity ? logf(row.sum_exp(0.0f)) : max + logf(exps);
}

// The logits become q up to a factor; returns their sum.
template <int N>
__device__ float score_row(LogitRow<N>& row, bool is_softmax, float max) {
#pragma unroll
  for (int i = 0; i < 4 * N; ++i)
    row.v[i] = is_softmax ? expf(row.v[i] - max) : scaled_sigmoid(row.v[i], max);
  return row.sum([](float x, int) { return x; });
}

// Of the tokens that a warp has seen: the sum of q, and that of z^2.
template <int N>
struct WarpSums {
  LogitRow<N> probabilities;
  float square;

  __device__ void add(LogitRow<N> row, bool is_softmax, float max, float exps) {
    const float z = log_sum_exp(row, max, exps);
    square += z * z;
    const float inverse_sum = 1.0f / score_row(row, is_softmax, max);
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) probabilities.v[i] += row.v[i] * inverse_sum;
  }

  // To out [E + 1], the square last.
  __device__ void store(float* out, int E) {
    probabilities.each(E, [&](float x, int e) { out[e] = x; });
    if (lane() == 0) out[E] = square;
  }
};

// The gradient of the sum of q, zero beyond the row: there q is zero as well, and their product counts.
template <int N>
__device__ LogitRow<N> load_gradient(const float* x, int E) {
  LogitRow<N> c{};
  c.each(E, [&](float& g, int e) { g = x[e]; });
  return c;
}

// The logits become the gradient of sum_i c_i q_i + d z^2, and of softmax weights of which `inner` is known:
//   dl_i = q_i (c_i - sum_j c_j q_j) [(1 - s_i) for sigmoids] + p_i (2 d z - inner),  p = softmax(logits)
template <int N>
__device__ void sums_backward(const RouteBackward& r, const LogitRow<N>& c, float max, float exps,
                              float inner, LogitRow<N>& row) {
  const float by_p = 2.0f * *r.grad_square * log_sum_exp(row, max, exps) - inner;
  LogitRow<N> q = row;
  const float inverse_exps = 1.0f / exps, inverse_sum = 1.0f / score_row(q, r.sums_softmax, max);
  const float mean = q.sum([&](float x, int i) { return x * inverse_sum * c.v[i]; });
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) {
    const float share = q.v[i] * inverse_sum, x = row.v[i];
    const float p = r.sums_softmax ? share : expf(x - max) * inverse_exps;
    const float slope = r.sums_softmax ? 1.0f : sigmoid(-x);
    row.v[i] = share * (c.v[i] - mean) * slope + p * by_p;
  }
}

}  // namespace sigma::cuda
