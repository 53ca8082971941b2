// The emulator itself: it does what the hardware does, and each class of bug that it is there for is caught.
#include <set>

#include "bugs.cuh"
#include "check.h"

using namespace bugs;
using check::dies;
using check::expect;

namespace {

constexpr int kSeeds = 4;

template <bool kHasBarrier>
bool reverses() {
  const std::vector<float> x = check::random_floats(64);
  std::vector<float> y = check::unwritten(64);
  SK_LAUNCH(reverse<kHasBarrier>, 1, 64, 64 * sizeof(float), nullptr, x.data(), y.data(), 64);
  return std::vector<float>(x.rbegin(), x.rend()) == y;
}

void test_missing_barrier() {
  bool always = true;
  check::with_seeds(kSeeds, [&] {
    expect(reverses<true>(), "a row reversed in shared memory");
    always &= reverses<false>();
  });
  expect(!always, "a missing barrier found by poison or by a shuffled schedule");
}

void test_deadlocks() {
  int out = 0;
  dies("deadlock in block (0,0,0)\n  thread (0,0,0) waits in __any_sync, mask ffffffff, arrived 0000ffff",
       [&] { SK_LAUNCH(half_a_warp_votes, 1, 32, 0, nullptr, &out); });
  dies("waits in __syncthreads, 16 of 32 threads arrived",
       [&] { SK_LAUNCH(barrier_in_a_branch, 1, 32, 0, nullptr, &out); });
  dies("lanes of mask ffffffff wait in __syncwarp",
       [&] { SK_LAUNCH(different_operations, 1, 32, 0, nullptr, &out); });
  dies("mask 00000001 lacks the lane that calls, 1", [&] { SK_LAUNCH(wrong_mask, 1, 32, 0, nullptr, &out); });
  dies("mask 0000ffff lacks lane 20, which is read",
       [&] { SK_LAUNCH(reads_beyond_mask, 1, 32, 0, nullptr, &out); });
}

void test_dependence_on_order() {
  const std::vector<float> x = check::random_floats(256, -1e4, 1e4);
  std::set<float> sums;
  std::set<int> winners;
  check::with_seeds(8, [&] {
    float sum = 0;
    SK_LAUNCH(sum_in_any_order, 1, 256, 0, nullptr, x.data(), &sum);
    sums.insert(sum);
    int winner = -1;
    SK_LAUNCH(last_block_wins, 5, 1, 0, nullptr, &winner);
    winners.insert(winner);
  });
  expect(sums.size() > 1, "float atomics whose sum depends on the order");
  expect(winners.size() > 1, "blocks whose order shows");
}

template <bool kWaits>
bool copies() {
  std::vector<uint4> x(32), y(32);
  for (unsigned i = 0; i < 32; ++i) x[i] = {i, i, i, i};
  SK_LAUNCH(copy_and_read<kWaits>, 1, 32, 32 * sizeof(uint4), nullptr, x.data(), y.data());
  for (unsigned i = 0; i < 32; ++i)
    if (y[i].w != 31 - i) return false;
  return true;
}

void test_copies() {
  expect(copies<true>(), "an asynchronous copy");
  expect(!copies<false>(), "an asynchronous copy that nobody waits for");
  alignas(16) unsigned char x[32] = {};
  dies("is not aligned to 16 bytes", [&] { SK_LAUNCH(misaligned_copy, 1, 1, 16, nullptr, x); });
}

void test_illegal_launches() {
  int out = 0;
  const auto error_of = [&](dim3 grid, dim3 block, size_t smem) {
    SK_LAUNCH(last_block_wins, grid, block, smem, nullptr, &out);
    return cudaGetLastError();
  };
  expect(error_of(0, 32, 0) == cudaErrorInvalidConfiguration, "an empty grid");
  expect(error_of(1, 1025, 0) == cudaErrorInvalidConfiguration, "a block too large");
  expect(error_of({1, 65536}, 32, 0) == cudaErrorInvalidConfiguration, "a grid too high");
  expect(error_of(1, 32, (48 << 10) + 1) == cudaErrorInvalidConfiguration,
         "shared memory that was not asked for");
  expect(cudaFuncSetAttribute(last_block_wins, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 << 10) ==
             cudaErrorInvalidValue,
         "more shared memory than there is");
  cudaGetLastError();
  cudaFuncSetAttribute(last_block_wins, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10);
  expect(error_of(1, 32, 64 << 10) == cudaSuccess, "shared memory that was asked for");
}

void test_bounds() {
#if defined(__SANITIZE_ADDRESS__)
  std::vector<float> x(40);
  dies("heap-buffer-overflow", [&] { SK_LAUNCH(beyond_dynamic, 1, 8, 8 * sizeof(int), nullptr, 8); });
  int out = 0;
  dies("global-buffer-overflow", [&] { SK_LAUNCH(beyond_static, 1, 1, 0, nullptr, 8, &out); });
  dies("heap-buffer-overflow", [&] { SK_LAUNCH(beyond_global, 2, 32, 0, nullptr, x.data(), 40); });
  alignas(16) float y[8] = {};
  dies("misaligned address", [&] { SK_LAUNCH(load_vector, 1, 1, 0, nullptr, y + 1, x.data()); });
#endif
}

__global__ void warp_functions(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int bits = 0, same = 0;
  const auto note = [&](bool is_true) { bits = bits << 1 | is_true; };
  note(__shfl_sync(kAllLanes, lane, 5) == 5);
  note(__shfl_sync(kAllLanes, lane, 1, 8) == lane / 8 * 8 + 1);
  note(__shfl_xor_sync(kAllLanes, lane, 7) == (lane ^ 7));
  note(__shfl_up_sync(kAllLanes, lane, 3) == (lane < 3 ? lane : lane - 3));
  note(__shfl_down_sync(kAllLanes, lane, 3) == (lane > 28 ? lane : lane + 3));
  note(__ballot_sync(kAllLanes, lane % 2) == 0xAAAAAAAA);
  note(__any_sync(kAllLanes, lane == 9) && !__any_sync(kAllLanes, 0));
  note(__all_sync(kAllLanes, 1) && !__all_sync(kAllLanes, lane != 9));
  note(__match_any_sync(kAllLanes, lane % 4) == 0x11111111u << lane % 4);
  note(__match_all_sync(kAllLanes, 3, &same) == kAllLanes && same);
  note(__match_all_sync(kAllLanes, lane, &same) == 0 && !same);
  note(__reduce_add_sync(kAllLanes, lane) == 496);
  note(__reduce_min_sync(kAllLanes, lane + 1) == 1 && __reduce_max_sync(kAllLanes, lane) == 31);
  note(__reduce_or_sync(kAllLanes, 1u << lane) == kAllLanes && __reduce_and_sync(kAllLanes, 1u << lane) == 0);
  // Halves that meet apart, one of them twice as often.
  const unsigned half = lane < 16 ? 0x0000FFFF : 0xFFFF0000;
  for (int i = 0; i < (lane < 16 ? 1 : 2); ++i) note(__reduce_max_sync(half, lane) == (lane < 16 ? 15 : 31));
  out[lane] = bits;
}

__global__ void block_functions(int* out) {
  if (threadIdx.x >= 40) return;  // a barrier does not wait for those that are gone
  const int i = static_cast<int>(threadIdx.x);
  const bool is_right = __syncthreads_or(i == 3) && !__syncthreads_or(0) && __syncthreads_and(1) &&
                        !__syncthreads_and(i != 3) && __syncthreads_count(i % 2) == 20;
  out[i] = is_right;
}

void test_functions() {
  check::with_seeds(kSeeds, [] {
    std::vector<int> out(32), there(40);
    SK_LAUNCH(warp_functions, 1, 32, 0, nullptr, out.data());
    bool is_right = true;
    for (int i = 0; i < 32; ++i) is_right &= out[i] == (i < 16 ? 0x7FFF : 0xFFFF);
    expect(is_right, "warp functions: %x and %x", out[0], out[31]);
    SK_LAUNCH(block_functions, 1, 64, 0, nullptr, there.data());
    expect(there == std::vector<int>(40, 1), "barriers that count");
  });
}

__global__ void multiply(const Bf16* a, const Bf16* b, float* c) {
  SK_DYN_SMEM(Bf16, tile);  // a [16][16], b [16][8]
  for (int i = lane(); i < 256; i += kWarp) tile[i] = a[i];
  for (int i = lane(); i < 128; i += kWarp) tile[256 + i] = b[i];
  __syncwarp();
  uint32_t x[4], w[4];
  float sum[4] = {1, 1, 1, 1};
  load_matrices(x, &tile[lane() % 16 * 16 + lane() / 16 * 8]);
  load_matrices_transposed(w, &tile[256 + lane() % 16 * 8]);
  mma<Bf16>(sum, x, {w[0], w[1]});
  for (int i = 0; i < 4; ++i) c[(lane() / 4 + i / 2 * 8) * 8 + lane() % 4 * 2 + i % 2] = sum[i];
}

void test_tensor_core() {
  std::vector<Bf16> a(256), b(128);
  for (Bf16& x : a) x = {simt::float_to_bf16(check::random_floats(1)[0])};
  for (Bf16& x : b) x = {simt::float_to_bf16(check::random_floats(1)[0])};
  std::vector<float> c = check::unwritten(128);
  SK_LAUNCH(multiply, 1, 32, 384 * sizeof(Bf16), nullptr, a.data(), b.data(), c.data());
  std::vector<double> want(128, 1.0);
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n)
      for (int k = 0; k < 16; ++k)
        want[m * 8 + n] += static_cast<double>(to_float(a[m * 16 + k])) * to_float(b[k * 8 + n]);
  expect(check::is_close(c, want, 1e-6), "a product on the tensor core");
}

}  // namespace

int main() {
  test_functions();
  test_tensor_core();
  test_missing_barrier();
  test_deadlocks();
  test_dependence_on_order();
  test_copies();
  test_illegal_launches();
  test_bounds();
  return check::report("equipment");
}
