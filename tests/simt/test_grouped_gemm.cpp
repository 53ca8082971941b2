// The grouped products against plain loops in double: every tile shape, both layouts, tails, rows gathered
// and scattered, factors, idle and crowded experts.
#include <algorithm>
#include <numeric>

#include "check.h"
#include "cuda/grouped_gemm.h"
#include "numbers.h"

using namespace sigma::cuda;
using check::expect;
using check::stored;
using Floats = std::vector<float>;
using Ints = std::vector<int32_t>;

namespace {

enum class Load { kEven, kAllOnOne, kIdleExperts, kEdges };

// Rows of an expert at the edges of every tile: of the launch that serves it, too.
constexpr int kEdges[] = {0, 1, 15, 16, 17, 31, 32, 33, 64, 65, 129};
constexpr int64_t kEdgeRows = 403;

Ints offsets_of(int64_t R, int E, Load load) {
  Ints offsets(E + 1, 0);
  if (load == Load::kEdges) {
    for (int e = 0; e < E; ++e) offsets[e + 1] = offsets[e] + (e < 11 ? kEdges[e] : 0);
    return offsets;
  }
  for (int e = 0; e < E; ++e) {
    const int64_t even = R * (e + 1) / E, all = e >= E / 2 ? R : 0,
                  idle = e % 2 ? R * (e + 1) / E : offsets[e];
    offsets[e + 1] = static_cast<int32_t>(load == Load::kEven ? even : load == Load::kAllOnOne ? all : idle);
  }
  offsets[E] = static_cast<int32_t>(R);
  return offsets;
}

struct Case {
  int64_t R;
  int E;
  int64_t N, K;
  Load load;
  int64_t pad = 0;  // of rows: 8 keeps vectors, 1 does not
  int k = 0;        // not 0: rows gathered by slot / k, scattered by slot and scaled
};

template <class T>
void test_gemm(const Case& c, bool is_transposed) {
  const int64_t tokens = c.k ? (c.R + c.k - 1) / c.k : c.R, ldx = c.K + c.pad, ldy = c.N + c.pad;
  const int64_t w_row = (is_transposed ? c.K : c.N) + c.pad, w_expert = (is_transposed ? c.N : c.K) * w_row;
  Floats x = check::random_floats(tokens * ldx), w = check::random_floats(c.E * w_expert);
  const std::vector<T> x_stored = stored<T>(x), w_stored = stored<T>(w);
  const Ints offsets = offsets_of(c.R, c.E, c.load);
  Ints slot(c.R);
  std::iota(slot.begin(), slot.end(), 0);
  if (c.k) std::shuffle(slot.begin(), slot.end(), check::generator);
  const Floats scale = check::random_floats(c.R);

  std::vector<T> y(c.R * ldy, check::nan_of<T>());
  const GroupedGemm<T> g{.R = c.R,
                         .E = c.E,
                         .N = c.N,
                         .K = c.K,
                         .offsets = offsets.data(),
                         .x = {x_stored.data(), ldx, c.k ? slot.data() : nullptr, std::max(c.k, 1)},
                         .w = w_stored.data(),
                         .w_expert = w_expert,
                         .w_row = w_row,
                         .is_transposed = is_transposed,
                         .y = {y.data(), ldy, c.k ? slot.data() : nullptr, 1},
                         .scale = c.k ? scale.data() : nullptr,
                         .slot_of_row = slot.data()};
  bool is_right = grouped_gemm(g, nullptr) == cudaSuccess;

  std::vector<T> got;
  std::vector<double> want;
  for (int e = 0; e < c.E; ++e)
    for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r) {
      const T* const row = &y[(c.k ? slot[r] : r) * ldy];
      got.insert(got.end(), row, row + c.N);
      for (int64_t i = 0; i < c.pad; ++i) is_right &= std::isnan(to_float(row[c.N + i]));  // left alone
      for (int64_t n = 0; n < c.N; ++n) {
        double sum = 0;
        for (int64_t k = 0; k < c.K; ++k)
          sum += static_cast<double>(x[(c.k ? slot[r] / c.k : r) * ldx + k]) *
                 w[e * w_expert + (is_transposed ? n * w_row + k : k * w_row + n)];
        want.push_back(c.k ? scale[slot[r]] * sum : sum);
      }
    }
  expect(is_right && check::is_close(got, want, check::rounding<T>() + 1e-6, check::float_of<T>),
         "grouped_gemm R=%d E=%d N=%d K=%d, %s", static_cast<int>(c.R), c.E, static_cast<int>(c.N),
         static_cast<int>(c.K), is_transposed ? "[E, N, K]" : "[E, K, N]");
}

// a [R, N], b [R, K]: the names of the forward's sizes.
template <class T>
void test_outer(const Case& c, bool adds) {
  const int64_t tokens = c.k ? (c.R + c.k - 1) / c.k : c.R, lda = c.N + c.pad, ldb = c.K + c.pad,
                ldo = c.K + c.pad;
  Floats a = check::random_floats(c.R * lda), b = check::random_floats(tokens * ldb);
  Floats before = check::random_floats(c.E * c.N * ldo);
  const std::vector<T> a_stored = stored<T>(a), b_stored = stored<T>(b);
  std::vector<T> out = stored<T>(before);
  const Ints offsets = offsets_of(c.R, c.E, c.load);
  Ints slot(c.R);
  std::iota(slot.begin(), slot.end(), 0);
  if (c.k) std::shuffle(slot.begin(), slot.end(), check::generator);
  const GroupedOuter<T> g{.E = c.E,
                          .A = c.N,
                          .B = c.K,
                          .offsets = offsets.data(),
                          .a = {a_stored.data(), lda, nullptr, 1},
                          .b = {b_stored.data(), ldb, c.k ? slot.data() : nullptr, std::max(c.k, 1)},
                          .out = out.data(),
                          .out_expert = c.N * ldo,
                          .out_row = ldo,
                          .adds = adds};
  bool is_right = grouped_outer(g, nullptr) == cudaSuccess;
  std::vector<T> got;
  std::vector<double> want;
  for (int e = 0; e < c.E; ++e)
    for (int64_t n = 0; n < c.N; ++n)
      for (int64_t k = 0; k < ldo; ++k) {
        const int64_t at = (e * c.N + n) * ldo + k;
        double sum = adds || k >= c.K ? before[at] : 0.0;
        for (int64_t r = offsets[e]; k < c.K && r < offsets[e + 1]; ++r)
          sum += static_cast<double>(a[r * lda + n]) * b[(c.k ? slot[r] / c.k : r) * ldb + k];
        want.push_back(sum);
        got.push_back(out[at]);
      }
  // The product is rounded, and where it adds the sum is again.
  const double bound = (adds ? 2 : 1) * check::rounding<T>() + 1e-6;
  expect(is_right && check::is_close(got, want, bound, check::float_of<T>),
         "grouped_outer R=%d E=%d A=%d B=%d%s", static_cast<int>(c.R), c.E, static_cast<int>(c.N),
         static_cast<int>(c.K), adds ? ", adding" : "");
}

template <class T>
void test(const Case& c) {
  test_gemm<T>(c, true);
  test_gemm<T>(c, false);
  test_outer<T>(c, false);
  test_outer<T>(c, true);
}

}  // namespace

int main() {
  const Case cases[] = {
      {0, 3, 8, 8, Load::kEven},
      {1, 1, 1, 1, Load::kEven},
      {5, 3, 8, 16, Load::kIdleExperts},
      {13, 4, 131, 37, Load::kEven, 1},          // 16-row tiles, scalar loads
      {37, 2, 136, 72, Load::kEven, 8, 2},       // 32
      {50, 2, 40, 104, Load::kAllOnOne, 8},      // 128
      {45, 1, 33, 130, Load::kEven, 1, 1},       // 64
      {150, 2, 136, 48, Load::kAllOnOne, 8, 3},  // 128, a second tile that is nearly empty
      {150, 1, 136, 48, Load::kEven, 8, 3},      // 128 alone
      {96, 40, 8, 40, Load::kEven, 0, 8},        // more experts than lanes
      {kEdgeRows, 60, 8, 16, Load::kEdges},      // tiles of 16 and 64
      {kEdgeRows, 16, 8, 16, Load::kEdges},      // of 32 and 128
      {kEdgeRows, 11, 8, 16, Load::kEdges},      // of 64 and 128
  };
  for (const Case& c : cases) test<Bf16>(c);
  test<F16>(cases[3]);
  test<F16>(cases[4]);
  check::with_seeds(3, [&] { test<Bf16>(cases[5]); });
  return check::report("grouped_gemm");
}
