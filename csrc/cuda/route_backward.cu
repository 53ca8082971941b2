// The gradient of the router's weights, and in the same pass of the sums over the tokens; a warp a token.
//
// softmax: dl_i = p_i (g_i - sum_j g_j p_j), g zero off the chosen; normalised: the same over the chosen
// alone. sigmoid: dl_j = g_j s_j (1 - s_j); normalised, w_j = s_j / S: dl_j = (g_j - sum_l g_l w_l) w_j (1 -
// s_j). Sums: router_sums.cuh. Bound: one read of the logits where the gradient is dense, one write of it.
#include "route.h"
#include "route_row.cuh"
#include "router_sums.cuh"

namespace sigma::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int64_t kMaxBlocks = 4096;

template <int N>
__device__ void store(float* out, const LogitRow<N>& row, int E, bool has_vectors) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = LogitRow<N>::index(4 * i);
    if (has_vectors && e + 4 <= E) {
      const auto* const four = &row.v[4 * i];
      *reinterpret_cast<Vector<float, 4>*>(out + e) = {four[0], four[1], four[2], four[3]};
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (e + j < E) out[e + j] = row.v[4 * i + j];
    }
  }
}

template <int N, bool kHasSums>
__device__ void token_backward(const RouteBackward& r, int64_t t, bool reads_vectors, bool writes_vectors,
                               const LogitRow<N>& grad_probabilities) {
  const float* const logits = r.logits + t * r.ld;
  const float* const grad = r.grad_weights + t * r.k;
  const int32_t* const indices = r.indices + t * r.k;
  float* const out = r.grad_logits + t * r.E;
  const bool is_dense = r.is_softmax && !r.is_normalized;
  LogitRow<N> row;
  float row_max = 0.0f, exps = 1.0f;
  if (kHasSums || is_dense) {
    row.load(logits, r.E, reads_vectors);
    row_max = row.max();
    exps = row.sum_exp(row_max);
  }
  float max = -kInfinity, inverse_sum = 1.0f, inner = 0.0f;
  if (is_dense) {
    max = row_max;
    inverse_sum = 1.0f / exps;
  } else if (r.is_normalized) {
    each_choice(logits, indices, r.k, [&](int, float x) { max = fmaxf(max, x); });
    max = warp_max(max);
    float sum = 0.0f;
    each_choice(logits, indices, r.k, [&](int, float x) { sum += chosen_score(r, x, max); });
    inverse_sum = 1.0f / warp_sum(sum);
  }
  if (is_dense || r.is_normalized) {
    each_choice(logits, indices, r.k,
                [&](int j, float x) { inner += grad[j] * chosen_score(r, x, max) * inverse_sum; });
    inner = warp_sum(inner);
  }
  if constexpr (kHasSums) {
    sums_backward(r, grad_probabilities, row_max, exps, is_dense ? inner : 0.0f, row);
  } else {
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) row.v[i] = is_dense ? expf(row.v[i] - max) * inverse_sum * -inner : 0.0f;
  }
  store(out, row, r.E, writes_vectors);
  __syncwarp();  // the chosen are written twice, these last
  each_choice(logits, indices, r.k, [&](int j, float x) {
    const float slope = r.is_softmax ? 1.0f : 1.0f - sigmoid(x);
    const float off_mean = kHasSums && is_dense ? grad[j] : grad[j] - inner;  // such a row has `inner` in it
    const float of_weight = chosen_score(r, x, max) * inverse_sum * off_mean * slope;
    out[indices[j]] = kHasSums ? out[indices[j]] + of_weight : of_weight;
  });
}

template <int N, bool kHasSums>
__global__ void __launch_bounds__(kThreads)
    route_backward_kernel(RouteBackward r, bool reads_vectors, bool writes_vectors) {
  LogitRow<N> grad_probabilities{};
  if constexpr (kHasSums) grad_probabilities = load_gradient<N>(r.grad_probabilities, r.E);
  for (int64_t t = blockIdx.x * int64_t{kWarps} + warp(); t < r.T; t += gridDim.x * int64_t{kWarps})
    token_backward<N, kHasSums>(r, t, reads_vectors, writes_vectors, grad_probabilities);
}

}  // namespace

cudaError_t route_backward(const RouteBackward& r, cudaStream_t stream) {
  if (r.E < 1 || r.E > kMaxExperts) return cudaErrorInvalidValue;
  if (r.T == 0) return cudaSuccess;
  with_row_size(r.E, [&]<int N>() {
    const auto kernel =
        r.grad_probabilities ? route_backward_kernel<N, true> : route_backward_kernel<N, false>;
    SK_LAUNCH(kernel, smaller(ceil_div(r.T, kWarps), kMaxBlocks), kThreads, 0, stream, r,
              is_aligned(r.logits, 16) && r.ld % 4 == 0, is_aligned(r.grad_logits, 16) && r.E % 4 == 0);
  });
  return cudaGetLastError();
}

}  // namespace sigma::cuda
