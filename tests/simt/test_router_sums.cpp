// Sums over the tokens from the pass that routes, and their gradient, against their definition in double.
#include <algorithm>
#include <optional>

#include "check.h"
#include "cuda/route.h"

using namespace sigma::cuda;
using check::expect;
using Doubles = std::vector<double>;
using Floats = std::vector<float>;
using Ints = std::vector<int32_t>;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Case {
  int T, E, k;
  bool is_softmax = true, is_normalized = false, sums_softmax = true;
  int pad = 0, offset = 0;  // between rows; floats before the first
  int ld() const { return E + pad; }
};

std::string name(const Case& c) {
  return "T=" + std::to_string(c.T) + " E=" + std::to_string(c.E) + " k=" + std::to_string(c.k) +
         (c.is_softmax ? " softmax" : " sigmoid") + (c.is_normalized ? " normalised" : "") +
         (c.sums_softmax ? ", sums of softmax" : ", sums of sigmoids");
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// The logarithm of a score, which does not underflow.
double log_score(bool is_softmax, double x) {
  if (is_softmax) return x;
  return x > 0 ? -std::log1p(std::exp(-x)) : x - std::log1p(std::exp(x));
}

double log_sum_exp(const Doubles& x) {
  const double max = *std::max_element(x.begin(), x.end());
  if (std::isinf(max)) return max;
  double sum = 0;
  for (const double each : x) sum += std::exp(each - max);
  return max + std::log(sum);
}

Doubles softmax(const Doubles& x) {
  const double z = log_sum_exp(x);
  Doubles p(x.size());
  for (size_t i = 0; i < x.size(); ++i) p[i] = std::exp(x[i] - z);
  return p;
}

Doubles probabilities(bool is_softmax, const float* logits, int E) {
  Doubles logs(E);
  for (int e = 0; e < E; ++e) logs[e] = log_score(is_softmax, logits[e]);
  return softmax(logs);
}

struct Result {
  Floats weights, probabilities, square;
  Ints indices, counts, offsets, row_map;
};

Result run(const Case& c, const float* logits, bool has_sums) {
  const int64_t R = int64_t{c.T} * c.k;
  Result out{check::unwritten(R), check::unwritten(c.E), check::unwritten(1), Ints(R, -1),
             Ints(c.E, -1),       Ints(c.E + 1, -1),     Ints(R, -1)};
  Ints workspace(route_workspace(c.T, c.E, has_sums) / sizeof(int32_t), -1);
  const cudaError_t error = route({.T = c.T,
                                   .E = c.E,
                                   .k = c.k,
                                   .logits = logits,
                                   .ld = c.ld(),
                                   .bias = nullptr,
                                   .is_softmax = c.is_softmax,
                                   .is_normalized = c.is_normalized,
                                   .indices = out.indices.data(),
                                   .weights = out.weights.data(),
                                   .counts = out.counts.data(),
                                   .offsets = out.offsets.data(),
                                   .row_map = out.row_map.data(),
                                   .workspace = workspace.data(),
                                   .sums_softmax = c.sums_softmax,
                                   .probabilities = has_sums ? out.probabilities.data() : nullptr,
                                   .square = has_sums ? out.square.data() : nullptr},
                                  nullptr);
  expect(error == cudaSuccess, "route: %s", cudaGetErrorString(error));
  return out;
}

struct Gradients {
  Floats weights, probabilities, square;
};

Floats run_backward(const Case& c, const float* logits, const Ints& indices, const Gradients& g) {
  Floats out = check::unwritten(int64_t{c.T} * c.E);
  const cudaError_t error = route_backward({.T = c.T,
                                            .E = c.E,
                                            .k = c.k,
                                            .logits = logits,
                                            .ld = c.ld(),
                                            .is_softmax = c.is_softmax,
                                            .is_normalized = c.is_normalized,
                                            .indices = indices.data(),
                                            .grad_weights = g.weights.data(),
                                            .grad_logits = out.data(),
                                            .sums_softmax = c.sums_softmax,
                                            .grad_probabilities = g.probabilities.data(),
                                            .grad_square = g.square.data()},
                                           nullptr);
  expect(error == cudaSuccess, "route_backward: %s", cudaGetErrorString(error));
  return out;
}

// The gradient of one token, term by term: of its weights, of its probabilities, of its squared z.
void add_gradient(const Case& c, const float* logits, const int32_t* indices, const float* grad_weights,
                  const Gradients& g, double* out) {
  const Doubles x(logits, logits + c.E), p = softmax(x), q = probabilities(c.sums_softmax, logits, c.E);
  // A weight is exp(log score - log of what it is divided by).
  Doubles chosen(c.k), weights(c.k);
  for (int j = 0; j < c.k; ++j) chosen[j] = log_score(c.is_softmax, x[indices[j]]);
  if (c.is_normalized) weights = softmax(chosen);
  double inner = 0;
  for (int j = 0; j < c.k; ++j) {
    if (!c.is_normalized) weights[j] = c.is_softmax ? p[indices[j]] : sigmoid(x[indices[j]]);
    inner += grad_weights[j] * weights[j];
  }
  const bool is_divided = c.is_softmax || c.is_normalized;
  for (int j = 0; j < c.k; ++j) {
    const double slope = c.is_softmax ? 1 : sigmoid(-x[indices[j]]);
    const bool is_dense = c.is_softmax && !c.is_normalized;
    out[indices[j]] += weights[j] * slope * (grad_weights[j] - (is_divided && !is_dense ? inner : 0));
  }
  double mean = 0;
  for (int e = 0; e < c.E; ++e) mean += g.probabilities[e] * q[e];
  for (int e = 0; e < c.E; ++e) {
    if (c.is_softmax && !c.is_normalized) out[e] -= p[e] * inner;
    out[e] += q[e] * (g.probabilities[e] - mean) * (c.sums_softmax ? 1 : sigmoid(-x[e]));
    out[e] += 2 * g.square[0] * log_sum_exp(x) * p[e];
  }
}

// Logits of any size, and among them rows that are all equal and elements that are -infinity.
Floats some_logits(const Case& c) {
  Floats logits = check::random_floats(c.offset + int64_t{c.T} * c.ld(), -4, 4);
  for (int t = 0; t < c.T; ++t) {
    float* const row = &logits[c.offset + int64_t{t} * c.ld()];
    const float shift = t % 4 == 1 ? -500 : t % 4 == 2 ? 90 : 0;
    for (int e = 0; e < c.E; ++e) {
      row[e] = t % 7 == 3 ? shift : row[e] + shift;
      if (t % 5 == 4 && e % 3 == 1) row[e] = -kInf;
    }
  }
  return logits;
}

// One seed runs blocks and threads in order, the others shuffle them: the bits may not differ.
void test_case(const Case& c, int seeds = 2) {
  const Floats memory = some_logits(c);
  const float* const logits = memory.data() + c.offset;
  const Gradients grad{check::random_floats(int64_t{c.T} * c.k), check::random_floats(c.E),
                       check::random_floats(1)};
  Doubles want(c.E, 0.0);
  double square = 0;
  for (int t = 0; t < c.T; ++t) {
    const float* const row = logits + int64_t{t} * c.ld();
    const Doubles q = probabilities(c.sums_softmax, row, c.E);
    for (int e = 0; e < c.E; ++e) want[e] += q[e];
    const double z = log_sum_exp(Doubles(row, row + c.E));
    square += z * z;
  }
  const std::string what = name(c);
  std::optional<Result> first;
  Floats first_grad;
  check::with_seeds(seeds, [&] {
    const Result got = run(c, logits, true), plain = run(c, logits, false);
    expect(check::has_same_bytes(got.weights, plain.weights) && got.indices == plain.indices &&
               got.counts == plain.counts && got.offsets == plain.offsets && got.row_map == plain.row_map,
           "%s: the Routing is not that of route", what.c_str());
    expect(check::is_close(got.probabilities, want, 1e-6), "%s: sum of probabilities", what.c_str());
    expect(check::is_close(got.square, {square}, 1e-6), "%s: sum of squares", what.c_str());
    const Floats got_grad = run_backward(c, logits, got.indices, grad);
    if (!first) {
      for (int t = 0; t < c.T; ++t) {  // each by its own size: that of z varies
        Doubles row(c.E, 0.0);
        add_gradient(c, logits + int64_t{t} * c.ld(), &got.indices[int64_t{t} * c.k],
                     &grad.weights[int64_t{t} * c.k], grad, row.data());
        const auto begin = got_grad.begin() + int64_t{t} * c.E;
        expect(check::is_close(Floats(begin, begin + c.E), row, 2e-6), "%s: gradient of token %d",
               what.c_str(), t);
      }
      first = got;
      first_grad = got_grad;
    }
    expect(check::has_same_bytes(got.probabilities, first->probabilities) &&
               check::has_same_bytes(got.square, first->square) &&
               check::has_same_bytes(got_grad, first_grad),
           "%s: other bits in another order of blocks and threads", what.c_str());
  });
}

// A largest logit that is infinite: z^2 is infinite and not NaN, and the gradient is NaN as that of a
// softmax.
void test_infinite_rows() {
  const Floats lowest(4, -kInf), highest = {0, kInf, 1, 2}, all(4, kInf), low = {-kInf, 1, 2, -kInf};
  for (const bool sums_softmax : {true, false}) {
    const Case c{.T = 1, .E = 4, .k = 2, .sums_softmax = sums_softmax};
    const Gradients ones{{1, 1}, {1, 2, 3, 4}, {1}};
    for (const Floats& row : {lowest, highest, all}) {
      const Result got = run(c, row.data(), true);
      expect(got.square[0] == kInf, "square of an infinite row: %f", got.square[0]);
      const bool is_nan = sums_softmax || row == lowest;  // sigmoids of +infinity are numbers
      expect(std::isnan(got.probabilities[0]) == is_nan, "probabilities of an infinite row: %f",
             got.probabilities[0]);
      for (const float g : run_backward(c, row.data(), got.indices, ones))
        expect(std::isnan(g), "gradient of an infinite row: %f", g);
    }
    const Result got = run(c, low.data(), true);
    const double z = 2 + std::log1p(std::exp(-1.0));
    expect(std::abs(got.square[0] - z * z) < 1e-5 && got.probabilities[0] == 0, "elements of -infinity");
    for (const float g : run_backward(c, low.data(), got.indices, ones))
      expect(std::isfinite(g), "gradient beside -infinity: %f", g);
  }
}

}  // namespace

int main() {
  for (const bool is_softmax : {true, false})
    for (const bool is_normalized : {true, false})
      for (const bool sums_softmax : {true, false}) {
        const auto test = [&](Case c) {
          c.is_softmax = is_softmax;
          c.is_normalized = is_normalized;
          c.sums_softmax = sums_softmax;
          test_case(c);
        };
        test({.T = 1, .E = 1, .k = 1});
        test({.T = 0, .E = 5, .k = 1});
        test({.T = 13, .E = 3, .k = 1});
        test({.T = 37, .E = 96, .k = 8});
        test({.T = 21, .E = 129, .k = 8, .pad = 3, .offset = 1});
      }
  for (const bool sums_softmax : {true, false})
    for (const Case& shape : {Case{.T = 5, .E = 128, .k = 1, .pad = 4}, Case{.T = 1, .E = 257, .k = 8},
                              Case{.T = 9, .E = 513, .k = 1}, Case{.T = 9, .E = 1024, .k = 8},
                              Case{.T = 7, .E = 1023, .k = 1, .pad = 2, .offset = 3}}) {
      Case c = shape;
      c.sums_softmax = sums_softmax;
      test_case(c);
    }
  // More blocks than warps that add them, the last with fewer tokens; then the most blocks there are.
  test_case({.T = 147, .E = 33, .k = 1});
  test_case({.T = 8 * 512 + 5, .E = 4, .k = 1, .is_softmax = false, .sums_softmax = false});
  test_infinite_rows();
  return check::report("router sums");
}
