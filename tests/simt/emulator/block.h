// One block of threads at a time, a fiber each, and what they meet at.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <tuple>
#include <type_traits>

#include "types.h"

namespace simt {

constexpr int kWarpSize = 32;
constexpr size_t kSharedMemory = 48 << 10;      // of a block, unless the kernel was allowed more
constexpr size_t kMaxSharedMemory = 227 << 10;  // on sm_90 and later
constexpr size_t kMaxPayload = 64;              // bytes a lane brings to a meeting

// 0 runs threads and blocks in their order; any other number shuffles both, and lets threads be overtaken at
// atomics.
void set_seed(uint64_t seed);

// What a lane of a warp waits for: all lanes of a mask, in the same operation.
struct Meeting {
  const char* what;
  uint32_t mask, arrived, left;  // left: who has yet to read
  alignas(16) unsigned char brought[kWarpSize][kMaxPayload];

  template <class T>
  T& of(int lane) {
    return *reinterpret_cast<T*>(brought[lane]);
  }
};

extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;
int lane_id();
int thread_number();  // in the block
void* dynamic_smem();

// The last to arrive calls `finish`, if there is one, before any goes on.
Meeting& arrive(const char* what, uint32_t mask, const void* payload, size_t bytes,
                void (*finish)(Meeting&) = nullptr);
void leave(Meeting& meeting);

// Lanes of `mask` bring one value each; `take` reads what it wants of the meeting.
template <class In, class Take>
auto meet(const char* what, uint32_t mask, const In& in, Take take) {
  static_assert(sizeof(In) <= kMaxPayload);
  Meeting& meeting = arrive(what, mask, &in, sizeof in);
  const auto out = take(meeting);
  leave(meeting);
  return out;
}

struct Votes {
  int any, all, count;
};
Votes meet_block(const char* what, int vote);

void may_be_overtaken();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void run(const void* kernel, dim3 grid, dim3 block, size_t smem, const std::function<void()>& thread);

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t, A&&... arguments) {
  const std::tuple<std::decay_t<P>...> copies(static_cast<A&&>(arguments)...);
  run(reinterpret_cast<const void*>(kernel), grid, block, smem, [&] { std::apply(kernel, copies); });
}

}  // namespace simt
