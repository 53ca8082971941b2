// The router's decision for T tokens, and the order of rows that follows from it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sigma::cuda {

constexpr int kMaxExperts = 1024;  // a row of logits lies in the registers of a warp

struct Route {
  int64_t T;
  int E, k;
  const float* logits;  // [T, E], ld apart
  int64_t ld;
  const float* bias;  // [E] or null
  bool is_softmax, is_normalized;
  int32_t* indices;  // [T, k]
  float* weights;    // [T, k]
  int32_t *counts, *offsets, *row_map;
  int32_t* workspace;  // route_workspace(T, E, has_sums) bytes
  // Sums over the tokens, from the same pass; null: not wanted.
  bool sums_softmax = true;        // q = softmax(logits); else sigmoids divided by their sum
  float* probabilities = nullptr;  // [E], of q
  float* square = nullptr;         // [], of (log sum exp logits)^2
};
int64_t route_workspace(int64_t T, int E, bool has_sums);
cudaError_t route(const Route& r, cudaStream_t stream);

struct RouteBackward {
  int64_t T;
  int E, k;
  const float* logits;
  int64_t ld;
  bool is_softmax, is_normalized;
  const int32_t* indices;
  const float* grad_weights;  // [T, k]
  float* grad_logits;         // [T, E] contiguous
  // By the sums of Route; null: they were not asked for.
  bool sums_softmax = true;
  const float* grad_probabilities = nullptr;  // [E]
  const float* grad_square = nullptr;         // []
};
cudaError_t route_backward(const RouteBackward& r, cudaStream_t stream);

}  // namespace sigma::cuda
