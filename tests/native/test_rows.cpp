// Rows and what decides about them: routing, permutation, conversion.

#include <algorithm>
#include <numeric>

#include "check.h"
#include "convert.h"
#include "permute.h"
#include "route.h"

using namespace sigma::cpu;

namespace {

template <class X>
void test_permute(const Case& c, const std::vector<int32_t>& row_map) {
  const int64_t T = c.T, H = c.H, k = c.k, R = T * k;
  const Floats w = random_floats(R);
  Floats x = random_floats(T * H), grad = random_floats(T * H), nan_rows(R * H, NAN), nan_tokens(T * H, NAN);
  const std::vector<X> stored_x = stored<X>(x), stored_grad = stored<X>(grad);
  std::vector<X> rows = stored<X>(nan_rows), out = stored<X>(nan_tokens), grad_y = rows;
  Floats grad_w(R, NAN);
  std::vector<int32_t> inverse(R);
  constexpr int64_t kBytes = sizeof(X);
  permute({.R = R,
           .row_bytes = H * kBytes,
           .k = c.k,
           .x = reinterpret_cast<const char*>(stored_x.data()),
           .ldx_bytes = H * kBytes,
           .row_map = row_map.data(),
           .out = reinterpret_cast<char*>(rows.data()),
           .threads = 2});
  invert(row_map.data(), R, inverse.data());
  combine(Combine<X>{.T = T,
                     .H = H,
                     .k = c.k,
                     .y = rows.data(),
                     .ldy = H,
                     .row_of_slot = inverse.data(),
                     .weights = w.data(),
                     .out = out.data(),
                     .threads = 2});
  combine_backward(CombineBackward<X>{.R = R,
                                      .H = H,
                                      .k = c.k,
                                      .grad_out = stored_grad.data(),
                                      .y = rows.data(),
                                      .ld_grad = H,
                                      .ldy = H,
                                      .row_map = row_map.data(),
                                      .weights = w.data(),
                                      .grad_y = grad_y.data(),
                                      .grad_weights = grad_w.data(),
                                      .threads = 2});
  std::vector<double> want(T * H), want_w(R);
  for (int64_t s = 0; s < R; ++s)
    for (int64_t h = 0; h < H; ++h) {
      want[s / k * H + h] += double(w[s]) * x[s / k * H + h];
      want_w[s] += double(grad[s / k * H + h]) * x[s / k * H + h];
    }
  std::vector<double> want_y(R * H);
  for (int64_t r = 0; r < R; ++r)
    for (int64_t h = 0; h < H; ++h) want_y[r * H + h] = double(w[row_map[r]]) * grad[row_map[r] / k * H + h];
  check("combine_backward, rows", grad_y, want_y);
  check("permute and combine", out, want);
  check("combine_backward", grad_w, want_w);
}

// What route writes of T tokens, k of E experts each, and the call for it: a softmax of these logits, nothing
// more unless a member is set.
struct Choices {
  Choices(int64_t T, int64_t E, int k)
      : T(T),
        E(E),
        k(k),
        indices(T * k),
        counts(E),
        offsets(E + 1),
        row_map(T * k),
        weights(T * k, NAN),
        sums(E, NAN),
        square(1, NAN) {}
  Route of(const Floats& logits) {
    return {.T = T,
            .E = E,
            .k = k,
            .logits = logits.data(),
            .ld = E,
            .bias = nullptr,
            .is_softmax = true,
            .is_normalized = false,
            .indices = indices.data(),
            .weights = weights.data(),
            .counts = counts.data(),
            .offsets = offsets.data(),
            .row_map = row_map.data(),
            .threads = 2};
  }

  int64_t T, E;
  int k;
  std::vector<int32_t> indices, counts, offsets, row_map;
  Floats weights, sums, square;
};

void test_route(const Case& c) {
  const int64_t T = c.T, E = c.E;
  for (const int k : {1, static_cast<int>(E)})
    for (int mode = 0; mode < 32; ++mode) {
      const bool is_softmax = mode & 1, is_normalized = mode & 2, has_bias = mode & 4;
      const bool has_sums = mode & 8, sums_softmax = mode & 16;
      if (sums_softmax && !has_sums) continue;
      const Floats logits = random_floats(T * E), bias = random_floats(E), grad_w = random_floats(T * k);
      const Floats grad_sums = random_floats(E), grad_square = random_floats(1);
      Floats grad(T * E, NAN);
      Choices chosen(T, E, k);
      Route r = chosen.of(logits);
      r.bias = has_bias ? bias.data() : nullptr;
      r.is_softmax = is_softmax;
      r.is_normalized = is_normalized;
      r.sums_softmax = sums_softmax;
      if (has_sums) r.probabilities = chosen.sums.data(), r.square = chosen.square.data();
      route(r);
      route_backward({.T = T,
                      .E = E,
                      .k = k,
                      .logits = logits.data(),
                      .ld = E,
                      .is_softmax = is_softmax,
                      .is_normalized = is_normalized,
                      .indices = chosen.indices.data(),
                      .grad_weights = grad_w.data(),
                      .grad_logits = grad.data(),
                      .threads = 2,
                      .sums_softmax = sums_softmax,
                      .grad_probabilities = has_sums ? grad_sums.data() : nullptr,
                      .grad_square = has_sums ? grad_square.data() : nullptr});
      std::vector<double> want(T * k), want_grad(T * E), want_sums(E), want_square(1);
      for (int64_t t = 0; t < T; ++t) {
        const auto exp_of = [&](int64_t e) { return std::exp(double{logits[t * E + e]}); };
        const auto sigmoid_of = [&](int64_t e) { return 1 / (1 + 1 / exp_of(e)); };
        const auto score = [&](int64_t e) { return is_softmax ? exp_of(e) : sigmoid_of(e); };
        const auto share = [&](int64_t e) { return sums_softmax ? exp_of(e) : sigmoid_of(e); };
        double all = 0, of_chosen = 0, exps = 0, shares = 0, inner = 0, inner_sums = 0;
        for (int64_t e = 0; e < E; ++e) all += score(e), exps += exp_of(e), shares += share(e);
        for (int j = 0; j < k; ++j) of_chosen += score(chosen.indices[t * k + j]);
        for (int64_t e = 0; e < E; ++e) inner_sums += grad_sums[e] * share(e) / shares;
        for (int j = 0; j < k; ++j) {
          want[t * k + j] = score(chosen.indices[t * k + j]) / (is_normalized ? of_chosen
                                                                : is_softmax  ? all
                                                                              : 1);
          inner += grad_w[t * k + j] * want[t * k + j];
        }
        double* const g = &want_grad[t * E];
        if (!is_softmax && !is_normalized) inner = 0;
        for (int64_t e = 0; is_softmax && !is_normalized && e < E; ++e) g[e] -= score(e) / all * inner;
        for (int j = 0; j < k; ++j) {
          const int64_t e = chosen.indices[t * k + j];
          const double slope = is_softmax ? 1 : 1 - sigmoid_of(e);
          g[e] += want[t * k + j] * slope * (grad_w[t * k + j] - (is_normalized ? inner : 0));
        }
        for (int64_t e = 0; has_sums && e < E; ++e) {
          const double slope = sums_softmax ? 1 : 1 - sigmoid_of(e);
          g[e] += share(e) / shares * (grad_sums[e] - inner_sums) * slope;
          g[e] += 2 * grad_square[0] * std::log(exps) * exp_of(e) / exps;
          want_sums[e] += share(e) / shares;
        }
        want_square[0] += std::log(exps) * std::log(exps);
      }
      check("route", chosen.weights, want);
      check("route_backward", grad, want_grad);
      if (!has_sums) continue;
      check("sums of route", chosen.sums, want_sums);
      check("squares of route", chosen.square, want_square);
    }
}

// The choice itself, of rows with ties: the largest first, ties to the lower.  Lists of up to one vector of
// any instruction set, and longer ones.
void test_choice(int64_t E) {
  const int64_t T = 20;
  Floats logits = random_floats(T * E);
  for (float& x : logits) x = std::round(16 * x);
  for (const int k : {1, 2, 4, 5, 8, 13, 16, 17}) {
    std::vector<int32_t> want, order(E);
    Choices chosen(T, E, k);
    route(chosen.of(logits));
    for (int64_t t = 0; t < T; ++t) {
      const float* const row = &logits[t * E];
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [row](int32_t a, int32_t b) { return row[a] > row[b]; });
      want.insert(want.end(), order.begin(), order.begin() + k);
    }
    expect("the choice of route", chosen.indices == want);
  }
}

// A largest logit that is infinite: the square is infinite, not NaN, unless the row has a NaN; the gradient
// is NaN.
void test_infinite_rows(int64_t E) {
  const float inf = INFINITY;
  for (const float largest : {inf, -inf})
    for (const bool has_nan : {false, true})
      for (const bool sums_softmax : {true, false}) {
        Floats logits(E, -inf), grad(E, 0);
        logits[E / 2] = largest;
        if (has_nan) logits[E - 1] = NAN;
        const Floats ones(E, 1);
        Choices chosen(1, E, 1);
        Route r = chosen.of(logits);
        r.sums_softmax = sums_softmax;
        r.probabilities = chosen.sums.data();
        r.square = chosen.square.data();
        route(r);
        const float square = chosen.square[0];
        expect("squares of infinite rows", has_nan ? std::isnan(square) : square == inf);
        route_backward({.T = 1,
                        .E = E,
                        .k = 1,
                        .logits = logits.data(),
                        .ld = E,
                        .is_softmax = true,
                        .is_normalized = false,
                        .indices = chosen.indices.data(),
                        .grad_weights = ones.data(),
                        .grad_logits = grad.data(),
                        .threads = 1,
                        .sums_softmax = sums_softmax,
                        .grad_probabilities = ones.data(),
                        .grad_square = ones.data()});
        expect("gradients of infinite rows",
               std::all_of(grad.begin(), grad.end(), [](float x) { return std::isnan(x); }));
      }
}

// Every number of 16 bits survives the way through f32, and every f32 goes to the nearest, ties to even.
template <class T>
void test_convert() {
  std::vector<T> all(1 << 16), back(1 << 16);
  Floats wide(1 << 16);
  for (int i = 0; i < 1 << 16; ++i) all[i].bits = static_cast<uint16_t>(i);
  widen(Convert<T>{.rows = 1,
                   .columns = 1 << 16,
                   .wide = wide.data(),
                   .narrow = all.data(),
                   .ld_narrow = 0,
                   .threads = 1});
  narrow(Convert<T>{.rows = 1,
                    .columns = 1 << 16,
                    .wide = wide.data(),
                    .narrow = back.data(),
                    .ld_narrow = 0,
                    .threads = 1});
  bool is_same = true;
  for (int i = 0; i < 1 << 16; ++i) {
    const float want = to_float(all[i]);
    is_same &= std::isnan(want) ? std::isnan(wide[i]) && std::isnan(to_float(back[i]))
                                : wide[i] == want && back[i].bits == all[i].bits;
  }
  expect("16 bits to f32 and back", is_same);

  Floats x = random_floats(1003);
  for (int i = 0; i < 64; ++i)
    x[i] = std::bit_cast<float>(0x3F808000u + (static_cast<uint32_t>(i) << 15));  // ties
  for (int i = 64; i < 128; ++i) x[i] *= std::ldexp(1.0f, 40 - i);  // small, denormal halves among them
  const Floats unrounded = x;
  const std::vector<T> want = stored<T>(x);
  std::vector<T> got(1003);
  narrow(Convert<T>{.rows = 17,
                    .columns = 59,
                    .wide = const_cast<float*>(unrounded.data()),
                    .narrow = got.data(),
                    .ld_narrow = 59,
                    .threads = 2});
  is_same = true;
  for (size_t i = 0; i < got.size(); ++i) is_same &= got[i].bits == want[i].bits;
  expect("f32 to the nearest of 16 bits, ties to even", is_same);
}

}  // namespace

void test_rows(const Case& c, const std::vector<int32_t>& row_map) {
  test_permute<float>(c, row_map);
  test_permute<Bf16>(c, row_map);
  test_permute<F16>(c, row_map);
  test_route(c);
}

void test_numbers_and_maps() {
  test_convert<Bf16>();
  test_convert<F16>();
  for (const int64_t E : {3, 40}) test_infinite_rows(E);  // a tail alone, whole vectors and a tail
  for (const int64_t E : {17, 40, 97}) test_choice(E);
  test_route({.T = 9, .H = 1, .I = 1, .E = 40, .k = 1});
  const int32_t bad[] = {0, 1, 5};
  int32_t counts[3], offsets[4], row_map[3];
  group_by_expert(bad, 3, 3, counts, offsets, row_map, 1) == 2 ? ++passed : ++failed;
  const int32_t twice[] = {1, 0, 1}, below[] = {0, -1, 2}, falls[] = {0, 2, 1, 3};
  wrong_row(bad, 3, 3) == 2 && wrong_row(bad, 3, 6) == -1 && wrong_row(twice, 3, 3) == 2 &&
          wrong_row(below, 3, 3) == 1
      ? ++passed
      : ++failed;
  !rises(falls, 3, 3) && !rises(bad, 2, 4) && rises(bad, 2, 5) ? ++passed : ++failed;
}
