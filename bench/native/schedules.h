// What bench/native/race.cpp asks of each version.
#pragma once

#include <cstdint>

struct Product {
  bool is_transposed, is_outer, adds;  // x @ W instead of x @ W.T; a.T @ b, to w; added to it
  int64_t E, N, K;
  const int32_t* offsets;
  const float* x;  // [T, K]
  float *w, *y;    // E matrices of N * K; [T, N]
  int threads;
};
