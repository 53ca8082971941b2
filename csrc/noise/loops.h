// Loops that time work, or nothing at all.  They write stamps into memory that is there already and do
// nothing else: no allocation, no lock, no system call but the clock, which is none where the kernel maps its
// clock.
//
// A loop ends early when *stop is not 0 and goes on where it was when it is called again, so that a signal
// can be answered in between; what that takes is then in the data as any other detour is.
#pragma once

#include <cstdint>

#include "clock.h"

namespace sigma::noise {

using Stop = const uint8_t*;  // a signal handler or another thread sets it
inline bool is_set(Stop stop) { return __atomic_load_n(stop, __ATOMIC_RELAXED) != 0; }

// The same work again and again (FWQ, Sottile and Minnich 2004).  Quantum i lies between edges i and i + 1:
// no time between two quanta belongs to neither, and a quantum costs one reading of the clock.
struct FixedWork {
  int64_t capacity;   // quanta
  int64_t* edges_ns;  // [capacity + 1], of which done + 1 are written
  int64_t done = 0;
  bool has_begun = false;
};

// Until `capacity` quanta are done or one ends at or after `duration_ns` from the first edge.
template <class Work>
void fixed_work(Work& work, FixedWork& f, int64_t duration_ns, Stop stop) {
  if (!f.has_begun) f.edges_ns[0] = now_ns();
  f.has_begun = true;
  const int64_t deadline = f.edges_ns[0] + duration_ns;
  int64_t done = f.done, t = f.edges_ns[done];
  while (done < f.capacity && t < deadline && !is_set(stop)) {
    work();
    t = now_ns();
    f.edges_ns[++done] = t;
  }
  f.done = done;
}

// As much work as fits into a given time (FTQ).  Quantum k lies between begin + k * quantum and
// begin + (k + 1) * quantum, whatever happened before: the grid never drifts.
struct FixedTime {
  int64_t begin_ns, quantum_ns, quanta;
  int64_t* stamps_ns;  // [quanta]: the first reading at or after the end of each
  int64_t* counts;     // [quanta]: chunks of work that ended within each
  int64_t done = 0;
  int64_t pending = 0;  // chunks that have ended within the quantum that is open
  int64_t skipped = 0;  // quanta within which none ended
};

// Waits until the grid begins.  A chunk counts where it ends: one that a detour of several quanta made late
// is of the quantum in which it was over, and those before are empty.
template <class Work>
void fixed_time(Work& chunk, FixedTime& f, Stop stop) {
  while (now_ns() < f.begin_ns && !is_set(stop)) {
  }
  int64_t end = f.begin_ns + (f.done + 1) * f.quantum_ns;
  while (f.done < f.quanta && !is_set(stop)) {
    chunk();
    const int64_t t = now_ns();
    for (; f.done < f.quanta && t >= end; ++f.done, end += f.quantum_ns) {
      f.stamps_ns[f.done] = t;
      f.counts[f.done] = f.pending;
      f.skipped += f.pending == 0;
      f.pending = 0;
    }
    ++f.pending;
  }
}

// Gaps between readings of the clock that nothing else separates (the "selfish" benchmark of Beckman et al.
// 2006): a gap above the threshold is time that this thread was not given.
struct Detours {
  int64_t threshold_ns;
  int64_t capacity;  // of the ring, which keeps the newest
  int64_t* begin_ns;
  int64_t* end_ns;        // [capacity], detour i at i % capacity
  int64_t found = 0;      // more than capacity: the oldest are gone
  int64_t total_ns = 0;   // of all that were found
  int64_t least_ns = -1;  // gap of all; -1 before there is one
  int64_t readings = 0;
  int64_t first_ns = 0, last_ns = 0;  // readings: what was observed lies between
};

// For `duration_ns` from the first reading.
void detours(Detours& d, int64_t duration_ns, Stop stop);

}  // namespace sigma::noise
