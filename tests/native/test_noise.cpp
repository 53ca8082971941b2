// The timed loops: stamps in order, what is stored where a ring, a deadline or a grid ends.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "check.h"
#include "noise/heartbeat.h"
#include "noise/loops.h"
#include "noise/work.h"

using namespace sigma::noise;
using Stamps = std::vector<int64_t>;

namespace {

constexpr int64_t kNever = int64_t{1} << 61;
constexpr uint8_t kGoOn = 0, kStop = 1;

bool rises(const Stamps& stamps, int64_t n) {
  for (int64_t i = 1; i < n; ++i)
    if (stamps[i] < stamps[i - 1]) return false;
  return true;
}

void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

void test_fixed_work() {
  Stamps edges(101, -1);
  Spin spin{.steps = 10, .state = 1};
  FixedWork f{.capacity = 100, .edges_ns = edges.data()};
  fixed_work(spin, f, kNever, &kGoOn);
  expect("as many quanta as there is room for", f.done == 100 && rises(edges, 101) && edges[0] > 0);
  uint64_t want = 1;
  for (int i = 0; i < 1000; ++i) want = want * 6364136223846793005u + 1442695040888963407u;
  expect("all their steps", spin.state == want);

  FixedWork none{.capacity = 0, .edges_ns = edges.data()};
  fixed_work(spin, none, kNever, &kGoOn);
  expect("no room, no quantum", none.done == 0 && spin.state == want);
  FixedWork late{.capacity = 100, .edges_ns = edges.data()};
  fixed_work(spin, late, 0, &kGoOn);
  expect("no time, no quantum", late.done == 0 && late.edges_ns[0] > 0 && spin.state == want);
  FixedWork slow{.capacity = 100, .edges_ns = edges.data()};
  const auto sleeps = [] { sleep_ms(2); };
  fixed_work(sleeps, slow, 5'000'000, &kGoOn);
  const int64_t last = slow.edges_ns[slow.done - 1] - edges[0], over = slow.edges_ns[slow.done] - edges[0];
  expect("quanta begin while there is time, and only then",
         slow.done <= 3 && last < 5'000'000 && over >= 5'000'000);

  int quanta = 0;
  uint8_t stop = 0;
  const auto third_stops = [&] { stop = ++quanta == 3; };
  FixedWork resumed{.capacity = 100, .edges_ns = edges.data()};
  fixed_work(third_stops, resumed, kNever, &stop);
  expect("stops after the quantum that was running", resumed.done == 3);
  const int64_t at = edges[3];
  stop = 0;
  fixed_work(third_stops, resumed, kNever, &stop);
  expect("goes on from the edge where it stopped",
         resumed.done == 100 && edges[3] == at && quanta == 100 && rises(edges, 101));
}

void test_fixed_time() {
  constexpr int64_t kQuanta = 8, kQuantum = 2'000'000;
  Stamps stamps(kQuanta, -1), counts(kQuanta, -1);
  const int64_t begin = now_ns() + 1'000'000;
  int64_t chunks = 0, first = 0;
  const auto chunk = [&] {
    if (chunks++ == 0) first = now_ns();
    if (chunks == 10) sleep_ms(5);  // whole quanta
  };
  FixedTime f{.begin_ns = begin,
              .quantum_ns = kQuantum,
              .quanta = kQuanta,
              .stamps_ns = stamps.data(),
              .counts = counts.data()};
  fixed_time(chunk, f, &kGoOn);
  expect("waits until the grid begins", first >= begin);
  int64_t sum = 0, empty = 0;
  bool is_late = true;
  for (int64_t k = 0; k < kQuanta; ++k) {
    sum += counts[k];
    empty += counts[k] == 0;
    is_late = is_late && stamps[k] >= begin + (k + 1) * kQuantum;
  }
  expect("no quantum is over before its end on the grid", is_late && rises(stamps, kQuanta));
  expect("every chunk but the last is counted once", sum + f.pending == chunks && f.pending == 1);
  // Chunk 10 ends in the third quantum of the grid at the earliest: of those that it slept through at least
  // one lies between the one in which it began and that in which it ended.
  expect("a quantum within which no chunk ended is skipped", f.skipped == empty && f.skipped >= 1);

  Stamps past(3, -1), none(3, -1);
  FixedTime late{.begin_ns = now_ns() - 1'000'000'000,
                 .quantum_ns = 1000,
                 .quanta = 3,
                 .stamps_ns = past.data(),
                 .counts = none.data()};
  fixed_time(chunk, late, &kGoOn);
  expect("a grid that is over is skipped", late.skipped == 3 && late.done == 3 && none == Stamps(3, 0));
  FixedTime zero{.begin_ns = 0, .quantum_ns = 1000, .quanta = 0, .stamps_ns = nullptr, .counts = nullptr};
  fixed_time(chunk, zero, &kGoOn);
  expect("no quanta", zero.done == 0 && zero.skipped == 0);
  FixedTime stopped{.begin_ns = now_ns() + 3'600'000'000'000,
                    .quantum_ns = 1000,
                    .quanta = 3,
                    .stamps_ns = past.data(),
                    .counts = none.data()};
  fixed_time(chunk, stopped, &kStop);
  expect("stops while it waits", stopped.done == 0);
}

void test_detours() {
  constexpr int64_t kCapacity = 16;
  Stamps begin(kCapacity, -1), end(kCapacity, -1);
  // Every gap is a detour, so the ring is full at once.
  Detours d{.threshold_ns = -1, .capacity = kCapacity, .begin_ns = begin.data(), .end_ns = end.data()};
  detours(d, 1'000'000, &kGoOn);
  expect("each gap was found", d.found == d.readings - 1 && d.found > kCapacity);
  expect("gaps add up to what was observed", d.total_ns == d.last_ns - d.first_ns && d.least_ns >= 0);
  bool is_newest = true;
  for (int64_t i = d.found - kCapacity; i < d.found; ++i) {
    const int64_t here = i % kCapacity, next = (i + 1) % kCapacity;
    is_newest =
        is_newest && begin[here] <= end[here] && end[here] == (i + 1 < d.found ? begin[next] : d.last_ns);
  }
  expect("a full ring keeps the newest", is_newest);

  const int64_t found = d.found, last = d.last_ns;
  detours(d, last - d.first_ns, &kGoOn);
  expect("a deadline that is over adds nothing", d.found == found && d.last_ns == last);
  sleep_ms(2);
  detours(d, last + 1 - d.first_ns, &kGoOn);
  expect("what lies between two calls is a detour",
         d.found == found + 1 && begin[found % kCapacity] == last && d.last_ns - last >= 2'000'000);

  Detours none{.threshold_ns = -1, .capacity = 0, .begin_ns = nullptr, .end_ns = nullptr};
  detours(none, 100'000, &kGoOn);
  expect("no ring, but the count", none.found > 0 && none.total_ns > 0);
  Detours quiet{
      .threshold_ns = kNever, .capacity = kCapacity, .begin_ns = begin.data(), .end_ns = end.data()};
  detours(quiet, 0, &kGoOn);
  expect("nothing before the first gap", quiet.found == 0 && quiet.least_ns == -1 && quiet.readings == 1);

  uint8_t stop = 0;
  std::thread other([&] {
    sleep_ms(5);
    __atomic_store_n(&stop, uint8_t{1}, __ATOMIC_RELAXED);
  });
  detours(quiet, kNever, &stop);
  other.join();
  expect("another thread ends it", quiet.readings > 1 && quiet.found == 0);
}

void test_work() {
  const std::vector<char> from = [] {
    std::vector<char> bytes(7 * 100);
    for (char& b : bytes) b = static_cast<char>(generator());
    return bytes;
  }();
  std::vector<char> to(from.size(), 0), want(from.size(), 0);
  Copy copy{.steps = 3, .from = from.data(), .to = to.data(), .slice = 100, .slices = 7};
  copy();
  std::copy_n(from.begin(), 300, want.begin());
  expect("three slices are copied and no more", to == want && copy.next == 3);
  copy();
  copy();
  expect("after the last slice the first comes again", to == from && copy.next == 2);

  constexpr int64_t kRows = 12, E = 3, N = 20, K = 24;
  const std::vector<int32_t> offsets = {0, 5, 5, kRows};
  const Floats x = random_floats(kRows * K), w = random_floats(E * N * K);
  Floats y(kRows * N, NAN);
  Product product{.steps = 2,
                  .gemm = {.E = E,
                           .N = N,
                           .K = K,
                           .offsets = offsets.data(),
                           .x = {x.data(), K},
                           .w = w.data(),
                           .w_expert = N * K,
                           .w_row = K,
                           .y = {y.data(), N},
                           .scale = nullptr,
                           .slot_of_row = nullptr,
                           .threads = 1}};
  Stamps edges(5, -1);
  FixedWork f{.capacity = 4, .edges_ns = edges.data()};
  fixed_work(product, f, kNever, &kGoOn);
  std::vector<double> sums(kRows * N, 0);
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t n = 0; n < N; ++n)
      for (int64_t k = 0; k < K; ++k)
        sums[r * N + n] += double{x[r * K + k]} * w[((r < 5 ? 0 : 2) * N + n) * K + k];
  check("the product", y, sums);
  expect("its stamps", f.done == 4 && rises(edges, 5));
}

void test_heartbeat() {
  constexpr int64_t kMs = 1'000'000;
  {
    Heartbeat none(kMs, int64_t{1} << 40);
    sleep_ms(100);
    expect("it never was so late", none.take().empty());
    expect("it took some time", none.spent_ns() > 0 && none.spent_ns() < 50 * kMs);
  }
  Heartbeat heartbeat(2 * kMs, 30 * kMs);
  const pid_t parent = getpid();
  const pid_t child = fork();
  if (child == 0) {  // the process cannot wake itself
    sleep_ms(20);
    kill(parent, SIGSTOP);
    sleep_ms(100);
    kill(parent, SIGCONT);
    _exit(0);
  }
  const int64_t begin = now_ns();
  waitpid(child, nullptr, 0);
  sleep_ms(10);
  const auto late = heartbeat.take();
  bool found = false;
  for (const LateWake& l : late)
    found |= l.woke_ns - l.due_ns > 90 * kMs && l.due_ns > begin && l.woke_ns < now_ns();
  expect("a stop of 100 ms is seen", found);
  expect("and once", heartbeat.take().empty());
}

}  // namespace

int main() {
  Stamps stamps(1000);
  read_clock(stamps.data(), 1000);
  expect("the clock rises", rises(stamps, 1000) && stamps[0] > 0);
  test_fixed_work();
  test_fixed_time();
  test_detours();
  test_work();
  test_heartbeat();
  std::printf("noise: %d passed, %d failed\n", passed, failed);
  return failed != 0;
}
