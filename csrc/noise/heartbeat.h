// A thread that sleeps for a few ms at a time and writes down when it woke late.
//
// A process that is stopped, or whose group has used up its quota, cannot say so while it lasts, and if it
// was asleep its counters never will: no thread of it was runnable.  But this one wakes late.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace sigma::noise {

struct LateWake {
  int64_t due_ns;
  int64_t woke_ns;
  int64_t
      waited_ns;  // runnable without a CPU, of this thread; since a reading within the last kReadEvery wakes
};

class Heartbeat {
 public:
  // Wakes every `period_ns`; more than `late_ns` after that is late.
  Heartbeat(int64_t period_ns, int64_t late_ns);
  ~Heartbeat();
  Heartbeat(const Heartbeat&) = delete;
  Heartbeat& operator=(const Heartbeat&) = delete;

  // What came since it was asked last.
  std::vector<LateWake> take();
  // Processor time of the thread.
  int64_t spent_ns() const { return spent_ns_.load(std::memory_order_relaxed); }

 private:
  void run();

  const int64_t period_ns_, late_ns_;
  std::atomic<bool> ends_{false};
  std::atomic<int64_t> spent_ns_{0};
  std::mutex mutex_;
  std::vector<LateWake> late_;
  std::thread thread_;  // last, so that all else is there when it begins
};

}  // namespace sigma::noise
