// The profiler's kernels do the work they say, and stamp every round of every block in order.
#include <cmath>

#include "check.h"
#include "cuda/fixed_work.h"

using namespace sigma::cuda;
using check::expect;

namespace {

bool is_in_order(const std::vector<Stamp>& stamps, int64_t rounds) {
  for (size_t i = 0; i < stamps.size(); ++i) {
    const Stamp& s = stamps[i];
    if (s.begin_ns <= 0 || s.end_ns < s.begin_ns || s.cycles < 0 || s.multiprocessor < 0) return false;
    if (i % rounds && stamps[i - 1].end_ns > s.begin_ns) return false;
  }
  return true;
}

void test_arithmetic() {
  constexpr int kBlocks = 2, kRounds = 3, kSteps = 5;
  std::vector<Stamp> stamps(kBlocks * kRounds, {-1, -1, -1, -1});
  std::vector<float> sums = check::unwritten(kBlocks * kWorkThreads);
  const Arithmetic a{kBlocks, kRounds, kSteps, stamps.data(), sums.data()};
  expect(run_arithmetic(a, nullptr) == cudaSuccess && is_in_order(stamps, kRounds), "stamps of arithmetic");
  std::vector<double> want;
  for (int i = 0; i < kBlocks * kWorkThreads; ++i) {
    double total = 0;
    for (int c = 0; c < 4; ++c)  // n links bring x to 1 - (1 - x) 0.9999^n
      total += 1 - (0.5 - 0.001 * (i % kWorkThreads + c)) * std::pow(0.9999, 8 * kRounds * kSteps);
    want.push_back(total);
  }
  expect(check::is_close(sums, want, 1e-5), "sums of arithmetic");
  expect(run_arithmetic({0, kRounds, kSteps, nullptr, nullptr}, nullptr) == cudaSuccess, "no blocks");
}

void test_copying() {
  constexpr int kBlocks = 3, kRounds = 2;
  constexpr int64_t kSlice = 301;
  std::vector<uint4> from(kBlocks * kSlice), to(kBlocks * kSlice);
  for (uint4& x : from) x = {static_cast<unsigned>(check::generator()), 1, 2, 3};
  std::vector<Stamp> stamps(kBlocks * kRounds, {-1, -1, -1, -1});
  const Copying c{kBlocks, kRounds, kSlice, from.data(), to.data(), stamps.data()};
  expect(run_copying(c, nullptr) == cudaSuccess && is_in_order(stamps, kRounds), "stamps of copying");
  expect(check::has_same_bytes(from, to), "slices copied");
}

}  // namespace

int main() {
  test_arithmetic();
  test_copying();
  return check::report("fixed_work");
}
