// A clock for kernels that read the device's.
#pragma once

#include <chrono>
#include <cstdint>

namespace simt {

inline int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace simt
