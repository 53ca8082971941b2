// Rows copied, summed and sent, against plain loops: vectors and tails, strides, rows left out, every dtype.
#include <algorithm>
#include <numeric>

#include "check.h"
#include "cuda/dispatch.h"
#include "cuda/rows.h"
#include "numbers.h"

using namespace sigma::cuda;
using check::expect;
using check::stored;
using Floats = std::vector<float>;
using Ints = std::vector<int32_t>;

namespace {

Ints permutation(int64_t n) {
  Ints out(n);
  std::iota(out.begin(), out.end(), 0);
  std::shuffle(out.begin(), out.end(), check::generator);
  return out;
}

struct Case {
  int T, H, k, pad;
};
const Case kCases[] = {{0, 8, 1, 0},  {1, 1, 1, 0},  {5, 33, 2, 1},
                       {7, 96, 3, 8}, {9, 37, 1, 3}, {3, 1100, 8, 4}};

template <class T>
void test_copy(const Case& c) {
  const int64_t R = int64_t{c.T} * c.k, ld = c.H + c.pad;
  Floats values = check::random_floats(c.T * ld);
  const std::vector<T> x = stored<T>(values);
  const Ints slot = permutation(R);
  std::vector<T> out(R * c.H), back(R * ld);
  const int64_t size = sizeof(T);
  CopyRows gather{R,           c.H * size, reinterpret_cast<const char*>(x.data()), ld * size,
                  slot.data(), c.k,        reinterpret_cast<char*>(out.data()),     c.H * size,
                  nullptr};
  bool is_right = copy_rows(gather, nullptr) == cudaSuccess;
  Ints there = slot;
  if (R > 2) there[1] = -1;
  CopyRows scatter{R,           c.H * size, reinterpret_cast<const char*>(out.data()), c.H * size,
                   nullptr,     1,          reinterpret_cast<char*>(back.data()),      ld * size,
                   there.data()};
  is_right &= copy_rows(scatter, nullptr) == cudaSuccess;
  for (int64_t r = 0; r < R; ++r)
    for (int h = 0; h < c.H; ++h) {
      const T want = x[slot[r] / c.k * ld + h];
      is_right &= std::memcmp(&out[r * c.H + h], &want, size) == 0;
      const T again = R > 2 && r == 1 ? T{} : want;
      is_right &= std::memcmp(&back[slot[r] * ld + h], &again, size) == 0;
    }
  expect(is_right, "copy_rows T=%d H=%d k=%d, %d bytes", c.T, c.H, c.k, static_cast<int>(size));
}

template <class T>
void test_combine(const Case& c, bool has_weights, bool drops) {
  const int64_t R = int64_t{c.T} * c.k, ld = c.H + c.pad;
  Floats y = check::random_floats(R * ld), grad = check::random_floats(c.T * ld);
  const std::vector<T> y_stored = stored<T>(y), grad_stored = stored<T>(grad);
  const Floats weights = check::random_floats(R);
  const Ints row_map = permutation(R);
  Ints row_of_slot(R, -2);
  expect(invert(row_map.data(), R, row_of_slot.data(), nullptr) == cudaSuccess, "invert");
  if (drops && R) row_of_slot[R / 2] = -1;

  std::vector<double> want(c.T * c.H, 0.0), want_y(R * c.H), want_weights(R, 0.0);
  for (int64_t s = 0; s < R; ++s)
    for (int h = 0; h < c.H; ++h)
      if (row_of_slot[s] >= 0)
        want[s / c.k * c.H + h] += (has_weights ? weights[s] : 1.0) * y[row_of_slot[s] * ld + h];
  for (int64_t r = 0; r < R; ++r)
    for (int h = 0; h < c.H; ++h) {
      const double g = grad[row_map[r] / c.k * ld + h];
      want_y[r * c.H + h] = weights[row_map[r]] * g;
      want_weights[row_map[r]] += g * y[r * ld + h];
    }

  const double rounding = check::rounding<T>();
  std::vector<T> out(c.T * c.H, check::nan_of<T>()), grad_y(R * c.H, check::nan_of<T>());
  Floats grad_weights = check::unwritten(R);
  expect(combine(Combine<T>{c.T, c.H, c.k, y_stored.data(), ld, row_of_slot.data(),
                            has_weights ? weights.data() : nullptr, out.data(), c.H},
                 nullptr) == cudaSuccess &&
             check::is_close(out, want, rounding + 1e-6, check::float_of<T>),
         "combine T=%d H=%d k=%d", c.T, c.H, c.k);
  CombineBackward<T> b{R,
                       c.H,
                       c.k,
                       grad_stored.data(),
                       ld,
                       y_stored.data(),
                       ld,
                       row_map.data(),
                       weights.data(),
                       grad_y.data(),
                       grad_weights.data()};
  expect(combine_backward(b, nullptr) == cudaSuccess &&
             check::is_close(grad_y, want_y, rounding + 1e-6, check::float_of<T>) &&
             check::is_close(grad_weights, want_weights, 1e-6 * std::sqrt(c.H)),
         "combine_backward T=%d H=%d k=%d", c.T, c.H, c.k);
  const std::vector<T> before = grad_y;
  b.grad_weights = nullptr;
  b.y = nullptr;
  expect(combine_backward(b, nullptr) == cudaSuccess && check::has_same_bytes(before, grad_y),
         "one gradient alone");
}

// All ranks in one process: what arrives is what was sent, in the order of experts and then of ranks.
void test_dispatch(int ranks, int experts, int64_t T, int k, int64_t H, int64_t capacity, int idle_expert) {
  const int E = ranks * experts;
  const int64_t R = T * k, segment = capacity ? capacity : 0;
  std::vector<Ints> sent(ranks), counts(ranks), place(ranks), slots(ranks), expert_of_slot(ranks);
  std::vector<std::vector<uint16_t>> x(ranks), buffer(ranks);
  for (int source = 0; source < ranks; ++source) {
    expert_of_slot[source].resize(R);
    for (int32_t& e : expert_of_slot[source]) {
      e = static_cast<int32_t>(check::generator() % E);
      if (e == idle_expert) e = 0;
    }
    Ints& row_map = slots[source];
    row_map = permutation(R);
    std::sort(row_map.begin(), row_map.end());
    std::stable_sort(row_map.begin(), row_map.end(),
                     [&](int a, int b) { return expert_of_slot[source][a] < expert_of_slot[source][b]; });
    counts[source].assign(E, 0);
    for (const int32_t e : expert_of_slot[source]) ++counts[source][e];
    Ints offsets(E + 1, 0);
    std::partial_sum(counts[source].begin(), counts[source].end(), offsets.begin() + 1);
    x[source].resize(T * H);
    for (int64_t i = 0; i < T * H; ++i) x[source][i] = static_cast<uint16_t>(check::generator());
    buffer[source].assign((capacity ? ranks * capacity : R) * H, 0);
    place[source].assign(R, -7);
    sent[source].assign(ranks, -7);
    int32_t dropped = -7;
    const Pack p{R,
                 H * 2,
                 E,
                 ranks,
                 k,
                 segment,
                 reinterpret_cast<const char*>(x[source].data()),
                 H * 2,
                 offsets.data(),
                 row_map.data(),
                 reinterpret_cast<char*>(buffer[source].data()),
                 place[source].data(),
                 sent[source].data(),
                 &dropped};
    expect(pack(p, nullptr) == cudaSuccess, "pack");
    int32_t missing = static_cast<int32_t>(std::count(place[source].begin(), place[source].end(), -1));
    expect(dropped == missing, "dropped %d, missing %d", dropped, missing);
  }
  bool is_right = true;
  for (int rank = 0; rank < ranks; ++rank) {
    // The all-to-all: segments for this rank, one after the other.
    std::vector<uint16_t> received;
    Ints by_source, begins;
    for (int source = 0; source < ranks; ++source) {
      const int64_t before =
          capacity ? rank * capacity : std::accumulate(sent[source].begin(), sent[source].begin() + rank, 0);
      begins.push_back(static_cast<int32_t>(received.size() / H));
      const int64_t rows = capacity ? capacity : sent[source][rank];
      received.insert(received.end(), buffer[source].begin() + before * H,
                      buffer[source].begin() + (before + rows) * H);
      by_source.insert(by_source.end(), counts[source].begin() + rank * experts,
                       counts[source].begin() + (rank + 1) * experts);
    }
    const int64_t rows = static_cast<int64_t>(received.size()) / H;
    Ints offsets(experts + 1, -7), places(rows, -7);
    const PlanReceive plan{ranks, experts, segment, rows, by_source.data(), offsets.data(), places.data()};
    is_right &= plan_receive(plan, nullptr) == cudaSuccess && offsets[0] == 0;
    int32_t r = 0;
    for (int e = 0; e < experts; ++e) {
      for (int source = 0; source < ranks; ++source)
        for (int64_t i = 0; i < R; ++i) {
          const int32_t slot = slots[source][i];
          if (expert_of_slot[source][slot] != rank * experts + e || place[source][slot] < 0) continue;
          is_right &= std::memcmp(&received[places[r] * H], &x[source][slot / k * H], H * 2) == 0;
          ++r;
        }
      is_right &= offsets[e + 1] == r;
    }
    for (; r < rows; ++r) is_right &= places[r] == -1;
  }
  expect(is_right, "dispatch of %d ranks, %d experts each, capacity %d", ranks, experts,
         static_cast<int>(capacity));
}

template <class T>
void test_all() {
  for (const Case& c : kCases) {
    test_copy<T>(c);
    test_combine<T>(c, true, false);
    test_combine<T>(c, false, true);
  }
}

}  // namespace

int main() {
  test_all<float>();
  test_all<Bf16>();
  test_all<F16>();
  check::with_seeds(2, [] {
    test_dispatch(1, 1, 1, 1, 1, 0, -1);
    test_dispatch(4, 3, 37, 1, 24, 0, 5);
    test_dispatch(4, 3, 37, 2, 24, 74, 5);
    test_dispatch(3, 32, 50, 8, 9, 0, 7);
    test_dispatch(2, 5, 40, 1, 8, 9, -1);  // segments too short
    test_dispatch(3, 2, 0, 1, 8, 4, -1);   // nothing to send
  });
  return check::report("rows");
}
