#include "block.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "copies.h"
#include "fiber.h"

// Every static __shared__ variable lies between these.
extern "C" {
extern uint64_t __start_simt_smem[] __attribute__((weak));
extern uint64_t __stop_simt_smem[] __attribute__((weak));
}

namespace simt {

uint3 thread_index, block_index;
dim3 block_size, grid_size;

namespace {

constexpr uint64_t kPoison = 0xCDCDCDCDCDCDCDCD;
constexpr int kMaxThreads = 1024, kMaxMeetings = 2 * kWarpSize;

enum class State { kReady, kWaits, kDone };

void thread_body();

struct Thread {
  explicit Thread(int number) : number(number), fiber(thread_body) {}

  const int number;
  uint3 index{};
  State state = State::kDone;
  const char* waits_in = nullptr;
  const Meeting* meeting = nullptr;  // null where it waits for the block
  Copies copies;
  Fiber fiber;
};

struct Barrier {
  const char* what = nullptr;
  int arrived = 0, any = 0, all = 1, count = 0;
  Votes result{};
};

std::vector<std::unique_ptr<Thread>> threads;  // kept from launch to launch
std::vector<std::vector<Meeting>> warps;
Thread* self = nullptr;
Barrier barrier;
int count = 0, alive = 0;
unsigned char* dynamic = nullptr;
const std::function<void()>* body = nullptr;
std::map<const void*, size_t> allowed;
cudaError_t last_error = cudaSuccess;

uint64_t state_of_chance = 0;
bool shuffles = false;

uint32_t chance() {  // splitmix64
  uint64_t z = state_of_chance += 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  return static_cast<uint32_t>((z ^ z >> 31) >> 32);
}

void shuffle(std::vector<int64_t>& order) {
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[(uint64_t{chance()} * i) >> 32]);
}

void thread_body() {
  (*body)();
  self->state = State::kDone;
  self->copies.finish();
  --alive;
  Fiber::yield();
}

void wait(const char* what, const Meeting* meeting) {
  self->state = State::kWaits;
  self->waits_in = what;
  self->meeting = meeting;
  Fiber::yield();
}

void open_barrier() {
  barrier.result = {barrier.any, barrier.all, barrier.count};
  barrier = {.result = barrier.result};
  for (int i = 0; i < count; ++i)
    if (threads[i]->state == State::kWaits && !threads[i]->meeting) threads[i]->state = State::kReady;
}

void report_deadlock() {
  std::fprintf(stderr, "simt: deadlock in block (%u,%u,%u)\n", block_index.x, block_index.y, block_index.z);
  const Meeting* told = nullptr;
  bool told_barrier = false;
  for (int i = 0; i < count; ++i) {
    const Thread& t = *threads[i];
    if (t.state != State::kWaits || (t.meeting ? t.meeting == told : told_barrier)) continue;
    std::fprintf(stderr, "  thread (%u,%u,%u) waits in %s", t.index.x, t.index.y, t.index.z, t.waits_in);
    if (t.meeting)
      std::fprintf(stderr, ", mask %08x, arrived %08x\n", t.meeting->mask, t.meeting->arrived);
    else
      std::fprintf(stderr, ", %d of %d threads arrived\n", barrier.arrived, alive);
    told = t.meeting ? t.meeting : told;
    told_barrier |= !t.meeting;
  }
  std::abort();
}

// ASan knows the gaps between the variables of the section; poison crosses them.
__attribute__((no_sanitize_address, no_sanitize_undefined)) void poison_static() {
  for (volatile uint64_t* p = __start_simt_smem; p + 1 <= __stop_simt_smem; ++p) *p = kPoison;
}

void run_block(size_t smem, std::vector<int64_t>& order) {
  poison_static();
  if (smem) std::memset(dynamic, 0xCD, smem);
  barrier = {};
  alive = count;
  for (auto& warp : warps)
    for (Meeting& m : warp) m.mask = 0;
  for (int i = 0; i < count; ++i) threads[i]->state = State::kReady;
  while (alive) {
    if (shuffles) shuffle(order);
    bool moved = false;
    for (const int64_t i : order) {
      Thread& t = *threads[i];
      if (t.state != State::kReady) continue;
      moved = true;
      self = &t;
      thread_index = t.index;
      t.fiber.resume();
      // A barrier waits for those alone that have not returned.
      if (barrier.arrived && barrier.arrived == alive) open_barrier();
    }
    if (!moved) report_deadlock();
  }
}

bool is_legal(const void* kernel, dim3 grid, dim3 block, size_t smem) {
  const auto limit = allowed.find(kernel);
  return grid.x && grid.y && grid.z && block.x && block.y && block.z && grid.x <= 0x7FFFFFFF &&
         grid.y <= 65535 && grid.z <= 65535 && block.z <= 64 &&
         uint64_t{block.x} * block.y * block.z <= kMaxThreads &&
         smem <= (limit == allowed.end() ? kSharedMemory : limit->second);
}

}  // namespace

void set_seed(uint64_t seed) {
  state_of_chance = seed;
  shuffles = seed != 0;
}

int thread_number() { return self->number; }
int lane_id() { return self->number % kWarpSize; }
void* dynamic_smem() { return dynamic; }
Copies& copies() { return self->copies; }

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "simt: block (%u,%u,%u) thread (%u,%u,%u): ", block_index.x, block_index.y,
               block_index.z, thread_index.x, thread_index.y, thread_index.z);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  std::abort();
}

void may_be_overtaken() {
  if (shuffles && chance() % 4 == 0) Fiber::yield();
}

Meeting& arrive(const char* what, uint32_t mask, const void* payload, size_t bytes,
                void (*finish)(Meeting&)) {
  const uint32_t me = 1u << lane_id();
  if (!(mask & me)) fail("%s: mask %08x lacks the lane that calls, %d", what, mask, lane_id());
  std::vector<Meeting>& warp = warps[self->number / kWarpSize];
  Meeting* place = nullptr;
  for (Meeting& m : warp) {
    if (m.mask == mask && !m.left && !(m.arrived & me)) {
      place = &m;
      break;
    }
    if (!place && !m.mask) place = &m;
  }
  if (!place) fail("%s: more meetings at once than lanes", what);
  if (!place->mask) {
    place->what = what;
    place->mask = mask;
    place->arrived = place->left = 0;
  }
  if (std::strcmp(place->what, what) != 0) fail("%s: lanes of mask %08x wait in %s", what, mask, place->what);
  if (bytes) std::memcpy(place->brought[lane_id()], payload, bytes);
  place->arrived |= me;
  if (place->arrived != mask) {
    wait(what, place);
    return *place;
  }
  if (finish) finish(*place);
  place->left = mask;
  const int first = self->number / kWarpSize * kWarpSize;
  for (int i = first; i < std::min(first + kWarpSize, count); ++i)
    if (threads[i]->state == State::kWaits && threads[i]->meeting == place) threads[i]->state = State::kReady;
  return *place;
}

void leave(Meeting& meeting) {
  meeting.left &= ~(1u << lane_id());
  if (!meeting.left) meeting.mask = 0;
}

Votes meet_block(const char* what, int vote) {
  if (barrier.arrived && std::strcmp(barrier.what, what) != 0)
    fail("%s: other threads of the block wait in %s", what, barrier.what);
  barrier.what = what;
  ++barrier.arrived;
  barrier.any |= vote != 0;
  barrier.all &= vote != 0;
  barrier.count += vote != 0;
  wait(what, nullptr);
  return barrier.result;
}

cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kMaxSharedMemory) return last_error = cudaErrorInvalidValue;
  allowed[kernel] = bytes;
  return cudaSuccess;
}

void run(const void* kernel, dim3 grid, dim3 block, size_t smem, const std::function<void()>& thread) {
  if (!is_legal(kernel, grid, block, smem)) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  grid_size = grid;
  block_size = block;
  body = &thread;
  count = static_cast<int>(block.x * block.y * block.z);
  while (static_cast<int>(threads.size()) < count)
    threads.push_back(std::make_unique<Thread>(static_cast<int>(threads.size())));
  while (warps.size() * kWarpSize < static_cast<size_t>(count)) warps.emplace_back(kMaxMeetings);
  for (int i = 0; i < count; ++i)
    threads[i]->index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};

  // Exactly as much as was asked for, so that a sanitizer sees the first byte beyond.
  const std::unique_ptr<unsigned char, void (*)(void*)> memory(
      smem ? static_cast<unsigned char*>(std::malloc(smem)) : nullptr, std::free);
  dynamic = memory.get();
  std::vector<int64_t> order(count), blocks(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (shuffles) shuffle(blocks);
  for (const int64_t b : blocks) {
    block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                   static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(smem, order);
  }
}

}  // namespace simt

cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }

cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unknown error";
}

cudaError_t cudaMemsetAsync(void* to, int byte, size_t count, cudaStream_t) {
  std::memset(to, byte, count);
  return cudaSuccess;
}
