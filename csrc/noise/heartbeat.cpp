#include "heartbeat.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"

namespace sigma::noise {
namespace {

constexpr int kReadEvery = 2;  // wakes: a reading of schedstat takes some 5 us
constexpr int64_t kSecond = 1'000'000'000;

// The second number of schedstat, 0 where there is none.
int64_t waited_ns(int fd) {
  char text[96];
  const ssize_t n = fd < 0 ? -1 : pread(fd, text, sizeof text - 1, 0);
  if (n <= 0) return 0;
  text[n] = 0;
  char* second;
  strtoll(text, &second, 10);
  return strtoll(second, nullptr, 10);
}

int64_t thread_time_ns() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec * kSecond + t.tv_nsec;
}

}  // namespace

Heartbeat::Heartbeat(int64_t period_ns, int64_t late_ns)
    : period_ns_(period_ns), late_ns_(late_ns), thread_([this] { run(); }) {}

Heartbeat::~Heartbeat() {
  ends_ = true;
  thread_.join();
}

std::vector<LateWake> Heartbeat::take() {
  std::vector<LateWake> taken;
  const std::lock_guard lock(mutex_);
  taken.swap(late_);
  return taken;
}

void Heartbeat::run() {
  const int fd = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
  int64_t waited = waited_ns(fd);
  for (int wakes = 1; !ends_; ++wakes) {
    const int64_t due = now_ns() + period_ns_;
    const timespec until{.tv_sec = due / kSecond, .tv_nsec = due % kSecond};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr) == EINTR) {
    }
    const int64_t woke = now_ns();
    const bool is_late = woke - due > late_ns_;
    if (!is_late && wakes % kReadEvery != 0) continue;
    const int64_t before = waited;
    waited = waited_ns(fd);
    spent_ns_.store(thread_time_ns(), std::memory_order_relaxed);
    if (!is_late) continue;
    const std::lock_guard lock(mutex_);
    late_.push_back({due, woke, waited - before});
  }
  if (fd >= 0) close(fd);
}

}  // namespace sigma::noise
