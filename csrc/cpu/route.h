// The router's decision for T tokens, and the order of rows that follows from it.
#pragma once

#include <cstdint>

namespace sigma::cpu {

struct Route {
  int64_t T, E;
  int k;
  const float* logits;  // [T, E], ld apart
  int64_t ld;
  const float* bias;  // [E] or null
  bool is_softmax, is_normalized;
  int32_t* indices;  // [T, k]
  float* weights;    // [T, k]
  int32_t *counts, *offsets, *row_map;
  int threads;
  // What balance losses read, taken in the same pass: over all tokens, the sum of their probabilities (of a
  // softmax, or of sigmoids divided by their sum) and of the squares of log sum exp logits.  Null: not
  // wanted.
  bool sums_softmax = true;
  float* probabilities = nullptr;  // [E]
  float* square = nullptr;         // []
};

void route(const Route& r);

struct RouteBackward {
  int64_t T, E;
  int k;
  const float* logits;
  int64_t ld;
  bool is_softmax, is_normalized;
  const int32_t* indices;
  const float* grad_weights;
  float* grad_logits;  // [T, E] contiguous
  int threads;
  // By the sums of Route; null: they were not asked for.
  bool sums_softmax = true;
  const float* grad_probabilities = nullptr;  // [E]
  const float* grad_square = nullptr;         // []
};

void route_backward(const RouteBackward& r);

// counts, offsets and row_map from given indices.  Returns the first slot whose index is out of range, or -1;
// then nothing has been written.  For int32_t and int64_t.
template <class Index>
int64_t group_by_expert(const Index* indices, int64_t R, int64_t E, int32_t* counts, int32_t* offsets,
                        int32_t* row_map, int threads);

// Whether offsets [E+1] rise from 0 to R.
bool rises(const int32_t* offsets, int64_t E, int64_t R);

// The first row of row_map [R] whose slot is not in 0..slots-1 or has a row already, or -1.
int64_t wrong_row(const int32_t* row_map, int64_t R, int64_t slots);

}  // namespace sigma::cpu
