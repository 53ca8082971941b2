// The activation and its gradient against their equations in double: vectors and tails, both dtypes.
#include <numeric>

#include "check.h"
#include "cuda/swiglu.h"
#include "numbers.h"

using namespace sigma::cuda;
using check::expect;
using check::stored;
using Floats = std::vector<float>;

namespace {

template <class T>
void test(int64_t R, int64_t I) {
  Floats gate_up = check::random_floats(R * 2 * I, -6, 6), grad = check::random_floats(R * I);
  if (R) gate_up[0] = -100, gate_up[I] = 3;  // its exponential is not finite
  const std::vector<T> gate_up_stored = stored<T>(gate_up), grad_stored = stored<T>(grad);
  const Floats weights = check::random_floats(R);
  std::vector<int32_t> slot(R);
  std::iota(slot.rbegin(), slot.rend(), 0);

  std::vector<double> hidden(R * I), weighted(R * I), of_gate_up(R * 2 * I), of_weights(R, 0.0);
  for (int64_t r = 0; r < R; ++r)
    for (int64_t i = 0; i < I; ++i) {
      const double g = gate_up[r * 2 * I + i], u = gate_up[r * 2 * I + I + i], d = grad[r * I + i];
      const double sigmoid = 1 / (1 + std::exp(-g)), w = weights[slot[r]];
      hidden[r * I + i] = g * sigmoid * u;
      weighted[r * I + i] = w * g * sigmoid * u;
      of_weights[slot[r]] += d * g * sigmoid * u;
      of_gate_up[r * 2 * I + i] = w * d * u * (sigmoid + g * sigmoid * (1 - sigmoid));
      of_gate_up[r * 2 * I + I + i] = w * d * g * sigmoid;
    }

  const T nan = check::nan_of<T>();
  std::vector<T> got(R * I, nan), got_weighted(R * I, nan), got_gate_up(R * 2 * I, nan);
  Floats got_weights = check::unwritten(R);
  const double bound = check::rounding<T>() + 4e-6;
  const auto close = [&](const std::vector<T>& x, const std::vector<double>& want) {
    return check::is_close(x, want, bound, check::float_of<T>);
  };
  const bool is_right = swiglu(Swiglu<T>{R, I, gate_up_stored.data(), got.data()}, nullptr) == cudaSuccess &&
                        swiglu_backward(SwigluBackward<T>{R, I, gate_up_stored.data(), grad_stored.data(),
                                                          weights.data(), slot.data(), got_gate_up.data(),
                                                          got_weighted.data(), got_weights.data()},
                                        nullptr) == cudaSuccess;
  expect(is_right && close(got, hidden), "swiglu R=%d I=%d", static_cast<int>(R), static_cast<int>(I));
  expect(close(got_gate_up, of_gate_up) && close(got_weighted, weighted) &&
             check::is_close(got_weights, of_weights, 4e-6 * std::sqrt(I)),
         "swiglu_backward R=%d I=%d", static_cast<int>(R), static_cast<int>(I));
}

}  // namespace

int main() {
  for (const auto& [R, I] : {std::pair{0, 8}, {1, 1}, {9, 33}, {5, 512}, {3, 600}}) {
    test<Bf16>(R, I);
    test<F16>(R, I);
  }
  return check::report("swiglu");
}
