// The clock of every stamp.
#pragma once

#include <time.h>

#include <cstdint>

namespace sigma::noise {

// Nanoseconds of CLOCK_MONOTONIC, which the ranks of a host share.
inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * int64_t{1'000'000'000} + t.tv_nsec;
}

// Readings one after another, stamps_ns [n]: their differences are what a reading costs.
inline void read_clock(int64_t* stamps_ns, int64_t n) {
  for (int64_t i = 0; i < n; ++i) stamps_ns[i] = now_ns();
}

}  // namespace sigma::noise
