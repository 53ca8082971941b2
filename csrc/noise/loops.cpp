#include "loops.h"

#include <algorithm>
#include <limits>

namespace sigma::noise {

void detours(Detours& d, int64_t duration_ns, Stop stop) {
  if (d.readings == 0) {
    d.first_ns = d.last_ns = now_ns();
    d.readings = 1;
  }
  // In registers: stores between two readings would be part of the least gap.
  const int64_t threshold = d.threshold_ns, deadline = d.first_ns + duration_ns;
  int64_t least = d.least_ns < 0 ? std::numeric_limits<int64_t>::max() : d.least_ns;
  int64_t last = d.last_ns, readings = d.readings;
  while (last < deadline && !is_set(stop)) {
    const int64_t t = now_ns(), gap = t - last;
    least = std::min(least, gap);
    ++readings;
    if (gap > threshold) {
      if (d.capacity > 0) {
        d.begin_ns[d.found % d.capacity] = last;
        d.end_ns[d.found % d.capacity] = t;
      }
      ++d.found;
      d.total_ns += gap;
    }
    last = t;
  }
  if (readings > 1) d.least_ns = least;
  d.last_ns = last;
  d.readings = readings;
}

}  // namespace sigma::noise
