// The kept blocks of memory, which std::threads share: alone, for ThreadSanitizer to watch.
#include <atomic>
#include <thread>

#include "check.h"
#include "memory.h"

using namespace sigma::cpu;

int main() {
  constexpr int64_t MiB = int64_t{1} << 20;
  auto take = [](int64_t bytes) {
    char* const p = static_cast<char*>(take_block(bytes));
    p[0] = p[bytes - 1] = 1;
    return p;
  };
  char* const a = take(5 * MiB);
  expect("a block is aligned to huge pages", reinterpret_cast<uintptr_t>(a) % (2 * MiB) == 0);
  give_block(a, 5 * MiB);
  expect("a free block is kept, rounded up", free_block_bytes() == 6 * MiB);
  expect("the next of its size gets it", take(6 * MiB - 1) == a);
  give_block(a, 6 * MiB - 1);
  char* const b = take(4 * MiB);
  expect("another size pushes it out, or 10 of at most 6 MiB would be held", free_block_bytes() == 0);
  char* const c = take(4 * MiB);
  give_block(b, 4 * MiB);
  give_block(c, 4 * MiB);
  expect("as much stays as was taken at once", free_block_bytes() == 8 * MiB);
  release_free_blocks();
  expect("all can be released", free_block_bytes() == 0);
  expect("no memory is an answer, not a crash", take_block(int64_t{1} << 60) == nullptr);

  std::vector<std::thread> threads;
  std::atomic<bool> is_exclusive = true;
  for (char id = 0; id < 4; ++id)
    threads.emplace_back([&, id] {
      for (int i = 0; i < 200; ++i) {
        char* const p = static_cast<char*>(take_block(2 * MiB));
        p[0] = p[MiB] = id;
        if (i % 8 == 0) std::this_thread::yield();
        if (p[0] != id || p[MiB] != id) is_exclusive = false;
        give_block(p, 2 * MiB);
      }
    });
  for (std::thread& t : threads) t.join();
  expect("a block has one owner", is_exclusive);
  release_free_blocks();
  std::printf("blocks: %d passed, %d failed\n", passed, failed);
  return failed != 0;
}
