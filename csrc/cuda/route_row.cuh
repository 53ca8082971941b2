// One token's logits in the registers of a warp, and what is asked of them.
#pragma once

#include "launch.cuh"
#include "number.cuh"

namespace sigma::cuda {

// Lane l has 4N of them: element (32 i + l) 4 + j at v[4i + j]; -infinity beyond the row.
template <int N>
struct LogitRow {
  float v[4 * N];

  __device__ static int index(int i) { return (i / 4 * kWarp + lane()) * 4 + i % 4; }

  template <class F>
  __device__ void each(int E, F f) {
#pragma unroll
    for (int i = 0; i < 4 * N; ++i)
      if (index(i) < E) f(v[i], index(i));
  }

  __device__ void load(const float* x, int E, bool has_vectors) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int e = index(4 * i);
      if (has_vectors && e + 4 <= E) {
        const auto four = *reinterpret_cast<const Vector<float, 4>*>(x + e);
#pragma unroll
        for (int j = 0; j < 4; ++j) v[4 * i + j] = four.x[j];
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) v[4 * i + j] = e + j < E ? x[e + j] : -kInfinity;
      }
    }
  }

  // NaN aside; -infinity where there is no other.
  __device__ float max() const {
    float out = -kInfinity;
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) out = fmaxf(out, v[i]);
    return warp_max(out);
  }

  // The sum of f over all elements, those beyond the row among them.
  template <class F>
  __device__ float sum(F f) const {
    float out = 0.0f;
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) out += f(v[i], i);
    return warp_sum(out);
  }

  __device__ float sum_exp(float shift) const {
    return sum([&](float x, int) { return expf(x - shift); });
  }
};

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// sigmoid(x) e^-min(max, 0) for x <= max: what a sum over the chosen is divided by stays a normal number,
// however low all the logits are.
__device__ inline float scaled_sigmoid(float x, float max) {
  return x > 0.0f ? sigmoid(x) : expf(x - fminf(max, 0.0f)) / (1.0f + expf(x));
}

// What a chosen expert's weight is, up to a factor that is 1 where weights are not normalised.
template <class R>
__device__ float chosen_score(const R& r, float logit, float max) {
  if (r.is_softmax) return expf(logit - max);
  return r.is_normalized ? scaled_sigmoid(logit, max) : sigmoid(logit);
}

// f(j, logit) for the choices of one token, those of a lane being j = lane, lane + 32, ...
template <class F>
__device__ void each_choice(const float* logits, const int32_t* indices, int k, F f) {
  for (int j = lane(); j < k; j += kWarp) f(j, logits[indices[j]]);
}

template <class F>
bool with_row_size(int E, F f) {
  if (E <= 128) return f.template operator()<1>(), true;
  if (E <= 256) return f.template operator()<2>(), true;
  if (E <= 512) return f.template operator()<4>(), true;
  if (E <= 1024) return f.template operator()<8>(), true;
  return false;
}

}  // namespace sigma::cuda
