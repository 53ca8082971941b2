// The choice of experts for one token, and its gradient.
//
// Without a bias the order of the scores is the order of the logits, so the choice is made on the logits:
// exact, however flat the scores.  NaN ranks as -infinity, ties go to the lower index.  Bound: one read of
// the logits.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace sigma::SK_NS {

SK_INLINE float scalar_sigmoid(float x) { return sigmoid(broadcast(x))[0]; }

// sigmoid(x) e^-min(max, 0) for x <= max: what a sum over the chosen is divided by stays a normal number,
// however low all the logits are.
SK_INLINE float scaled_sigmoid(float x, float max) {
  if (x > 0.0f) return scalar_sigmoid(x);
  const float shift = max < 0.0f ? max : 0.0f;
  return exp(broadcast(x - shift))[0] / (1.0f + exp(broadcast(x))[0]);
}

// The score of the chosen j, up to a factor that is 1 where the weights are not normalised.
template <class R>
SK_INLINE float chosen_score(const R& r, int j, float max) {
  const float l = r.logits[r.indices[j]];
  if (r.is_softmax) return exp(broadcast(l - max))[0];
  return r.is_normalized ? scaled_sigmoid(l, max) : scalar_sigmoid(l);
}

template <class R>
SK_INLINE float max_of_chosen(const R& r) {
  float max = -__builtin_inff();
  for (int j = 0; j < r.k; ++j) max = r.logits[r.indices[j]] > max ? r.logits[r.indices[j]] : max;
  return max;
}

// The largest, NaN aside; -infinity where there is none.
inline float row_max(const float* x, int64_t n) {
  Vec v = broadcast(-__builtin_inff());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec next = load(x + i);
    v = next > v ? next : v;
  }
  float best = max_lane(v);
  for (; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// The sum of f over a row, which f is given a vector at a time; its last may be partial.  The same order for
// all.
template <class F>
SK_INLINE float sum_row(int64_t n, const F& f) {
  Vec sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += f(i, kLanes);
  const float total = add_lanes(sum);
  if (i == n) return total;
  const Vec last = f(i, n - i);
  float tail = last[0];  // rounded by itself, and the whole once more
  for (int64_t j = 1; j < n - i; ++j) tail += last[j];
  return total + tail;
}

SK_INLINE Vec load_up_to(const float* p, int64_t n) { return n >= kLanes ? load(p) : load_partial(p, n); }
SK_INLINE void store_up_to(float* p, Vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  store_partial(p, v, n);
}

inline float sum_exp(const float* x, float shift, int64_t n) {
  return sum_row(n, [&](int64_t i, int64_t left) SK_STEP { return exp(load_up_to(x + i, left) - shift); });
}

// The same, and each term kept.
inline float sum_kept_exp(const float* x, float shift, float* y, int64_t n) {
  return sum_row(n, [&](int64_t i, int64_t left) SK_STEP {
    const Vec v = exp(load_up_to(x + i, left) - shift);
    store_up_to(y + i, v, left);
    return v;
  });
}

// y_i = sigmoid(x_i) e^-min(max, 0), as scaled_sigmoid, and their sum.
inline float sum_kept_sigmoid(const float* x, float max, float* y, int64_t n) {
  const float shift = max < 0.0f ? max : 0.0f;
  return sum_row(n, [&](int64_t i, int64_t left) SK_STEP {
    const Vec l = load_up_to(x + i, left);
    const Vec v = l > 0.0f ? sigmoid(l) : exp(l - shift) / (1.0f + exp(l));
    store_up_to(y + i, v, left);
    return v;
  });
}

// log sum exp from the largest and sum_exp(max).  Where the largest is infinite so is the answer, unless the
// row has a NaN: a sum of exps would tell neither, as exp clamps and inf - inf is NaN.
inline float log_sum_exp(const float* x, float max, float exps, int64_t n) {
  if (!__builtin_isinf(max)) return max + __builtin_logf(exps);
  return max + sum_row(n, [&](int64_t i, int64_t left) SK_STEP {
           const Vec v = load_up_to(x + i, left);
           return v == v ? Vec{} : v;
         });
}

inline float dot(const float* x, const float* y, int64_t n) {
  return sum_row(
      n, [&](int64_t i, int64_t left) SK_STEP { return load_up_to(x + i, left) * load_up_to(y + i, left); });
}

inline void add_scaled(const float* x, float factor, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes)
    store_up_to(y + i, load_up_to(y + i, n - i) + load_up_to(x + i, n - i) * factor, n - i);
}

inline void exp_scaled(const float* x, float shift, float factor, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, exp(load(x + i) - shift) * factor);
  if (i < n) store_partial(y + i, exp(load_partial(x + i, n - i) - shift) * factor, n - i);
}

inline void sigmoid_row(const float* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, sigmoid(load(x + i)));
  if (i < n) store_partial(y + i, sigmoid(load_partial(x + i, n - i)), n - i);
}

SK_INLINE float nan_last(float x) { return x == x ? x : -__builtin_inff(); }
SK_INLINE Vec nan_last(Vec x) { return x == x ? x : broadcast(-__builtin_inff()); }

// Where the first of those that equal the row's maximum is.
inline int32_t first_of(float max, const float* x, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    if (const uint32_t is = true_lanes(nan_last(load(x + i)) == max))
      return static_cast<int32_t>(i + __builtin_ctz(is));
  while (nan_last(x[i]) != max) ++i;
  return static_cast<int32_t>(i);
}

// The k largest, in order: insertion into a short sorted list.
inline void top_k_of_many(const float* x, int64_t n, int k, int32_t* indices) {
  int found = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float v = nan_last(x[i]);
    const auto at = [&](int j) { return nan_last(x[indices[j]]); };
    if (found == k && !(v > at(k - 1))) continue;
    int j = found < k ? found++ : k - 1;
    for (; j > 0 && v > at(j - 1); --j) indices[j] = indices[j - 1];
    indices[j] = static_cast<int32_t>(i);
  }
}

// The same for k <= kLanes: the list is one vector, an insertion a few instructions without a branch, and
// most elements are passed over a vector at a time.  7x (E = 96, k = 8, AVX-512).
inline void top_k(const float* x, int64_t n, int k, int32_t* indices) {
  Vec best = broadcast(__builtin_nanf(""));  // places not taken yet: nothing compares with them
  IVec at{};
  const auto insert = [&](Vec v, IVec i) SK_STEP {
    Vec before = turned(best, kLanes - 1);
    before[0] = __builtin_inff();
    at = best >= v ? at : before >= v ? i : turned(at, kLanes - 1);
    best = best >= v ? best : before >= v ? v : before;
  };
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i;
    const Vec next = nan_last(left >= kLanes ? load(x + i) : load_partial(x + i, left));
    const Vec last = shuffled(best, IVec{} + (k - 1));
    uint32_t rises = true_lanes(~(next <= last));
    if (left < kLanes) rises &= (1u << left) - 1;
    for (; rises; rises &= rises - 1) {
      const int lane = __builtin_ctz(rises);
      insert(shuffled(next, IVec{} + lane), IVec{} + static_cast<int32_t>(i + lane));
    }
  }
  memcpy(indices, &at, static_cast<size_t>(k) * sizeof(int32_t));
}

// Adds one token's probabilities to the sums over tokens, from the exps that the choice needs anyway where it
// can. Returns the sum of exps.
inline float add_to_sums(const RouteRow& r, float max) {
  const RouteSums& s = r.sums;
  const float exps = s.is_softmax ? sum_kept_exp(r.logits, max, s.q, r.E) : sum_exp(r.logits, max, r.E);
  const float total = s.is_softmax ? exps : sum_kept_sigmoid(r.logits, max, s.q, r.E);
  add_scaled(s.q, 1.0f / total, s.probabilities, r.E);
  return exps;
}

inline float route_row(const RouteRow& r) {
  float max = row_max(r.logits, r.E), inverse_sum = 1.0f, exps = 1.0f;
  if (r.sums.probabilities)
    exps = add_to_sums(r, max);
  else if (r.is_softmax && !(r.is_normalized && !r.bias))
    exps = sum_exp(r.logits, max, r.E);
  const float log_of_sum = r.sums.probabilities ? log_sum_exp(r.logits, max, exps, r.E) : 0.0f;
  if (r.is_softmax) inverse_sum = 1.0f / exps;
  const float* ranked = r.logits;
  if (r.bias) {
    if (r.is_softmax)
      exp_scaled(r.logits, max, inverse_sum, r.p, r.E);
    else
      sigmoid_row(r.logits, r.p, r.E);
    for (int64_t e = 0; e < r.E; ++e) r.p[e] += r.bias[e];
    ranked = r.p;
  }
  if (r.k == 1)
    r.indices[0] = first_of(r.bias ? row_max(ranked, r.E) : max, ranked, r.E);
  else
    (r.k <= kLanes ? top_k : top_k_of_many)(ranked, r.E, r.k, r.indices);

  if (r.is_normalized) {  // a softmax that is normalised over the chosen is the softmax of the chosen
    max = max_of_chosen(r);
    inverse_sum = 1.0f;
  }
  if (r.is_softmax) {
    for (int j = 0; j < r.k; ++j) r.weights[j] = r.logits[r.indices[j]];
    exp_scaled(r.weights, max, inverse_sum, r.weights, r.k);
  } else {
    for (int j = 0; j < r.k; ++j) r.weights[j] = chosen_score(r, j, max);
  }
  if (r.is_normalized) {
    float total = 0.0f;
    for (int j = 0; j < r.k; ++j) total += r.weights[j];
    for (int j = 0; j < r.k; ++j) r.weights[j] /= total;
  }
  return log_of_sum;
}

// The gradient by the logits of three things at once: the weights of the chosen (g, zero off them), the sum
// over tokens of the probabilities q (c), and that of the squares of z = log sum exp logits (d).
//   weights, softmax       dl_i = p_i (g_i - sum_j g_j p_j); normalised: the same over the chosen alone
//   weights, sigmoid       dl_j = g_j s_j (1 - s_j); normalised, w_j = s_j / S: (g_j - sum_l g_l w_l) w_j (1
//   - s_j) probabilities, softmax dl_i = q_i (c_i - sum_j c_j q_j) of divided sigmoids    dl_i = q_i (c_i -
//   sum_j c_j q_j) (1 - s_i) squares                dl_i = 2 d z p_i
// Whatever has p as its factor shares one pass.
inline void softmax_backward(const RouteRowBackward& r, bool has_weights, const float* c) {
  const float max = row_max(r.logits, r.E);
  float* const out = r.grad_logits;
  if (!c && r.grad_square == 0.0f) {  // then no term is wanted but the chosen's
    const float inverse_sum = 1.0f / sum_exp(r.logits, max, r.E);
    float inner = 0.0f;
    for (int j = 0; j < r.k; ++j)
      inner += r.grad_weights[j] * exp(broadcast(r.logits[r.indices[j]] - max))[0] * inverse_sum;
    exp_scaled(r.logits, max, -inner * inverse_sum, out, r.E);
    for (int j = 0; j < r.k; ++j) {
      const float p = exp(broadcast(r.logits[r.indices[j]] - max))[0] * inverse_sum;
      out[r.indices[j]] = p * (r.grad_weights[j] - inner);
    }
    return;
  }
  const float sum = sum_kept_exp(r.logits, max, r.q, r.E), inverse_sum = 1.0f / sum;
  const float square = 2.0f * r.grad_square * log_sum_exp(r.logits, max, sum, r.E);
  float inner = c ? dot(r.q, c, r.E) : 0.0f;
  for (int j = 0; has_weights && j < r.k; ++j) inner += r.grad_weights[j] * r.q[r.indices[j]];
  const float shift = square - inner * inverse_sum;
  for (int64_t i = 0; i < r.E; i += kLanes) {
    const int64_t left = r.E - i;
    const Vec by_q = c ? load_up_to(c + i, left) + shift : broadcast(shift);
    store_up_to(out + i, load_up_to(r.q + i, left) * inverse_sum * by_q, left);
  }
  for (int j = 0; has_weights && j < r.k; ++j)
    out[r.indices[j]] += r.q[r.indices[j]] * inverse_sum * r.grad_weights[j];
}

inline void add_chosen_backward(const RouteRowBackward& r) {
  const float max = max_of_chosen(r);
  float total = 0.0f, inner = 0.0f;
  if (r.is_normalized) {
    for (int j = 0; j < r.k; ++j) total += chosen_score(r, j, max);
    for (int j = 0; j < r.k; ++j) inner += r.grad_weights[j] * chosen_score(r, j, max) / total;
  }
  for (int j = 0; j < r.k; ++j) {
    const int32_t e = r.indices[j];
    const float slope = r.is_softmax ? 1.0f : scalar_sigmoid(-r.logits[e]);  // 1 - s, without cancellation
    const float grad_score = r.is_normalized ? (r.grad_weights[j] - inner) / total : r.grad_weights[j];
    r.grad_logits[e] += grad_score * chosen_score(r, j, max) * slope;
  }
}

inline void add_divided_sigmoids_backward(const RouteRowBackward& r) {
  const float total = sum_kept_sigmoid(r.logits, row_max(r.logits, r.E), r.q, r.E);
  const float inner = dot(r.q, r.grad_probabilities, r.E) / total;
  for (int64_t i = 0; i < r.E; i += kLanes) {
    const int64_t left = r.E - i;
    const Vec slope = sigmoid(-load_up_to(r.logits + i, left));
    const Vec grad = load_up_to(r.q + i, left) / total * (load_up_to(r.grad_probabilities + i, left) - inner);
    store_up_to(r.grad_logits + i, load_up_to(r.grad_logits + i, left) + grad * slope, left);
  }
}

inline void route_row_backward(const RouteRowBackward& r) {
  const bool weights_of_all = r.is_softmax && !r.is_normalized;
  const float* const c = r.sums_softmax ? r.grad_probabilities : nullptr;
  if (weights_of_all || c || r.grad_square != 0.0f)
    softmax_backward(r, weights_of_all, c);
  else
    memset(r.grad_logits, 0, static_cast<size_t>(r.E) * sizeof(float));
  if (!weights_of_all) add_chosen_backward(r);
  if (r.grad_probabilities && !r.sums_softmax) add_divided_sigmoids_backward(r);
}

}  // namespace sigma::SK_NS
