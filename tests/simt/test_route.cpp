// Routing and counting against their definition in double, and the order of rows against a stable sort.
#include <algorithm>
#include <numeric>

#include "check.h"
#include "cuda/group.h"
#include "cuda/route.h"

using namespace sigma::cuda;
using check::expect;
using Floats = std::vector<float>;
using Ints = std::vector<int32_t>;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Groups {
  Ints counts, offsets, row_map;
  bool operator==(const Groups&) const = default;
};

Groups sorted(const Ints& indices, int E) {
  Groups g{Ints(E, 0), Ints(E + 1, 0), Ints(indices.size())};
  for (const int32_t e : indices) ++g.counts[e];
  std::partial_sum(g.counts.begin(), g.counts.end(), g.offsets.begin() + 1);
  std::iota(g.row_map.begin(), g.row_map.end(), 0);
  std::stable_sort(g.row_map.begin(), g.row_map.end(), [&](int a, int b) { return indices[a] < indices[b]; });
  return g;
}

void test_group(int64_t R, int E, int last_expert) {
  Ints indices(R);
  for (int32_t& e : indices) e = static_cast<int32_t>(check::generator() % (last_expert + 1));
  const Groups want = sorted(indices, E);
  check::with_seeds(3, [&] {
    Groups got{Ints(E, -1), Ints(E + 1, -1), Ints(R, -1)};
    Ints workspace(group_workspace(R, E) / sizeof(int32_t), -1);
    const cudaError_t error = group_by_expert({.R = R,
                                               .E = E,
                                               .indices = indices.data(),
                                               .counts = got.counts.data(),
                                               .offsets = got.offsets.data(),
                                               .row_map = got.row_map.data(),
                                               .workspace = workspace.data()},
                                              nullptr);
    expect(error == cudaSuccess && got == want, "groups of %d slots, %d experts", static_cast<int>(R), E);
  });
}

struct Case {
  int T, E, k;
  bool is_softmax = true, is_normalized = false, has_bias = false;
  int pad = 0;  // between rows
};

double score(const Case& c, const float* logits, int e) {
  if (!c.is_softmax) return 1 / (1 + std::exp(-static_cast<double>(logits[e])));
  double max = -kInf, sum = 0;
  for (int i = 0; i < c.E; ++i) max = std::max(max, static_cast<double>(logits[i]));
  for (int i = 0; i < c.E; ++i) sum += std::exp(logits[i] - max);
  return std::exp(logits[e] - max) / sum;
}

// The k best of a token, and the weights of given choices.
Ints choices(const Case& c, const float* logits, const Floats& bias) {
  std::vector<double> by(c.E);
  for (int e = 0; e < c.E; ++e) {
    by[e] = c.has_bias ? score(c, logits, e) + bias[e] : logits[e];
    if (std::isnan(by[e])) by[e] = -kInf;
  }
  Ints order(c.E);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return by[a] > by[b]; });
  order.resize(c.k);
  return order;
}

std::vector<double> weights_of(const Case& c, const float* logits, const int32_t* indices) {
  std::vector<double> w(c.k);
  double total = 0, max = -kInf;
  for (int j = 0; j < c.k; ++j) max = std::max(max, static_cast<double>(logits[indices[j]]));
  for (int j = 0; j < c.k; ++j) {
    const double x = logits[indices[j]];
    // Normalised scores in a form that survives logits so low that every score is zero.
    w[j] = !c.is_normalized ? score(c, logits, indices[j])
           : c.is_softmax   ? std::exp(x - max)
                            : std::exp(x - max) / (1 + std::exp(x));
    total += w[j];
  }
  if (c.is_normalized)
    for (double& x : w) x /= total;
  return w;
}

struct Result {
  Floats weights;
  Ints indices;
  Groups groups;
};

Result run(const Case& c, const Floats& logits, const Floats& bias) {
  const int64_t R = int64_t{c.T} * c.k;
  Result out{check::unwritten(R), Ints(R, -1), {Ints(c.E, -1), Ints(c.E + 1, -1), Ints(R, -1)}};
  Ints workspace(route_workspace(c.T, c.E, false) / sizeof(int32_t), -1);
  const cudaError_t error = route({.T = c.T,
                                   .E = c.E,
                                   .k = c.k,
                                   .logits = logits.data(),
                                   .ld = c.E + c.pad,
                                   .bias = c.has_bias ? bias.data() : nullptr,
                                   .is_softmax = c.is_softmax,
                                   .is_normalized = c.is_normalized,
                                   .indices = out.indices.data(),
                                   .weights = out.weights.data(),
                                   .counts = out.groups.counts.data(),
                                   .offsets = out.groups.offsets.data(),
                                   .row_map = out.groups.row_map.data(),
                                   .workspace = workspace.data()},
                                  nullptr);
  expect(error == cudaSuccess, "route: %s", cudaGetErrorString(error));
  return out;
}

void test_backward(const Case& c, const Floats& logits, const Ints& indices) {
  const Floats grad = check::random_floats(int64_t{c.T} * c.k);
  Floats got = check::unwritten(int64_t{c.T} * c.E);
  const cudaError_t error = route_backward({.T = c.T,
                                            .E = c.E,
                                            .k = c.k,
                                            .logits = logits.data(),
                                            .ld = c.E + c.pad,
                                            .is_softmax = c.is_softmax,
                                            .is_normalized = c.is_normalized,
                                            .indices = indices.data(),
                                            .grad_weights = grad.data(),
                                            .grad_logits = got.data()},
                                           nullptr);
  // The closed form of csrc/cuda/route_backward.cu, from weights in double.
  std::vector<double> want(int64_t{c.T} * c.E, 0.0);
  double terms = 0;
  for (int t = 0; t < c.T; ++t) {
    const float* const l = &logits[int64_t{t} * (c.E + c.pad)];
    const int32_t* const at = &indices[int64_t{t} * c.k];
    double* const out = &want[int64_t{t} * c.E];
    const std::vector<double> w = weights_of(c, l, at);
    double inner = 0;
    for (int j = 0; j < c.k; ++j) inner += grad[t * c.k + j] * w[j];
    for (int j = 0; j < c.k; ++j) {
      const double g = grad[t * c.k + j], slope = c.is_softmax ? 1 : 1 - 1 / (1 + std::exp(-l[at[j]]));
      out[at[j]] += w[j] * slope * (c.is_normalized ? g - inner : g);
      terms = std::max(terms, std::abs(g * w[j]));
    }
    if (c.is_softmax && !c.is_normalized)
      for (int e = 0; e < c.E; ++e) out[e] -= score(c, l, e) * inner;
  }
  expect(error == cudaSuccess && check::is_close(got, want, 1e-6, terms), "route_backward T=%d E=%d k=%d",
         c.T, c.E, c.k);
}

void test_route(const Case& c, int seeds = 2) {
  Floats logits = check::random_floats(int64_t{c.T} * (c.E + c.pad), -4, 4), bias = check::random_floats(c.E);
  // Ties, in some rows everywhere.
  if (!c.has_bias)
    for (size_t i = 0; i < logits.size(); ++i)
      if (i % 3 == 0) logits[i] = std::round(logits[i]);
  check::with_seeds(seeds, [&] {
    const Result got = run(c, logits, bias);
    Ints indices;
    std::vector<double> weights;
    for (int t = 0; t < c.T; ++t) {
      const float* const row = &logits[int64_t{t} * (c.E + c.pad)];
      const Ints best = choices(c, row, bias);
      indices.insert(indices.end(), best.begin(), best.end());
      const std::vector<double> w = weights_of(c, row, best.data());
      weights.insert(weights.end(), w.begin(), w.end());
    }
    expect(got.indices == indices, "choices of T=%d E=%d k=%d", c.T, c.E, c.k);
    expect(check::is_close(got.weights, weights, 1e-6), "weights of T=%d E=%d k=%d", c.T, c.E, c.k);
    expect(got.groups == sorted(got.indices, c.E), "order of T=%d E=%d k=%d", c.T, c.E, c.k);
    test_backward(c, logits, got.indices);
  });
}

void test_unusual_logits() {
  const Case one{.T = 6, .E = 5, .k = 1}, two{.T = 6, .E = 5, .k = 2};
  const Floats logits = {kNan,  kNan, 1,     kNan,  1,                                 //
                         kNan,  kNan, kNan,  kNan,  kNan,                              //
                         -kInf, kNan, -kInf, -kInf, -kInf, 0, -0.0f, 0, -0.0f, -0.0f,  //
                         -0.0f, 0,    -1,    -1,    0,                                 //
                         -3,    kInf, 5,     kInf,  kNan};
  const Ints best = run(one, logits, {}).indices, both = run(two, logits, {}).indices;
  expect(best == Ints{2, 0, 0, 0, 0, 1}, "choices among NaN, infinities and signed zeros");
  expect(both == Ints{2, 4, 0, 1, 0, 1, 0, 1, 0, 1, 1, 3}, "two of them");
  // Scores that all are zero in float still have ratios.
  const Case low{.T = 1, .E = 4, .k = 2, .is_softmax = false, .is_normalized = true};
  const Floats deep = {-500, -499, -600, -700};
  const Floats weights = run(low, deep, {}).weights;
  const double want = 1 / (1 + std::exp(-1.0));
  expect(std::abs(weights[0] - want) < 1e-6 && std::abs(weights[1] - (1 - want)) < 1e-6,
         "ratios of low scores");
}

void test_refusals() {
  GroupByExpert g{};
  g.R = 1;
  g.E = kMaxGroups + 1;
  expect(group_by_expert(g, nullptr) == cudaErrorInvalidValue, "more experts than a block has memory for");
  Route r{};
  r.T = r.k = 1;
  r.E = kMaxExperts + 1;
  expect(route(r, nullptr) == cudaErrorInvalidValue, "more experts than a warp has registers for");
}

}  // namespace

int main() {
  for (const auto& [R, E, last] : {std::tuple{0, 3, 2},
                                   {1, 1, 0},
                                   {257, 7, 6},
                                   {1000, 5, 2},
                                   {513, 4, 0},
                                   {2048, 96, 95},
                                   {700, 1500, 1499},
                                   {300, kMaxGroups, 5000}})
    test_group(R, E, last);

  for (const bool is_softmax : {true, false})
    for (const bool is_normalized : {true, false})
      for (const bool has_bias : {true, false})
        for (const Case& shape :
             {Case{33, 7, 1}, Case{17, 96, 8}, Case{9, 36, 3, true, false, false, 4}, Case{5, 130, 40}})
          test_route({shape.T, shape.E, shape.k, is_softmax, is_normalized, has_bias, shape.pad});
  for (const Case& c : {Case{0, 5, 2}, Case{1, 1, 1}, Case{1, 5, 5}, Case{3, 513, 2}, Case{3, 1024, 1}})
    test_route(c);
  test_route({.T = 2048, .E = 96, .k = 1}, 1);
  test_unusual_logits();
  test_refusals();
  return check::report("route");
}
