#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <iterator>
#include <mutex>
#include <vector>

namespace sigma::cpu {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

int64_t round_up(int64_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

void* map_aligned(int64_t size) {
  const int64_t mapped = size + kHugePage;  // mmap aligns to small pages: cut a huge-page-aligned part out
  void* p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  char* const start = static_cast<char*>(p);
  char* const begin = start + (-reinterpret_cast<uintptr_t>(start) & (kHugePage - 1));
  if (begin > start) munmap(start, begin - start);
  if (const int64_t tail = start + mapped - (begin + size)) munmap(begin + size, tail);
  madvise(begin, size, MADV_HUGEPAGE);  // a hint: nothing depends on its answer
  return begin;
}

class Blocks {
 public:
  void* take(int64_t size) {
    const std::lock_guard lock(mutex_);
    const auto found =
        std::find_if(free_.rbegin(), free_.rend(), [&](const Block& b) { return b.size == size; });
    if (found != free_.rend()) {  // the newest: the likeliest to be in a cache
      void* const p = found->begin;
      free_.erase(std::next(found).base());
      free_bytes_ -= size;
      taken_bytes_ += size;
      return p;
    }
    most_bytes_ = std::max(most_bytes_, taken_bytes_ + size);
    release_down_to(most_bytes_ - taken_bytes_ - size);
    void* p = map_aligned(size);
    if (!p) {  // the free blocks of other sizes may be what is missing
      release_down_to(0);
      p = map_aligned(size);
    }
    if (p) taken_bytes_ += size;
    return p;
  }

  void give(void* p, int64_t size) {
    madvise(p, size, MADV_FREE);  // before it is free, since then it is another's to write
    const std::lock_guard lock(mutex_);
    taken_bytes_ -= size;
    free_bytes_ += size;
    free_.push_back({p, size});
  }

  int64_t free_bytes() {
    const std::lock_guard lock(mutex_);
    return free_bytes_;
  }

  void release() {
    const std::lock_guard lock(mutex_);
    release_down_to(0);
    most_bytes_ = taken_bytes_;
  }

 private:
  struct Block {
    void* begin;
    int64_t size;
  };

  void release_down_to(int64_t bytes) {
    auto oldest = free_.begin();
    for (; free_bytes_ > bytes; ++oldest) {
      munmap(oldest->begin, oldest->size);
      free_bytes_ -= oldest->size;
    }
    free_.erase(free_.begin(), oldest);
  }

  std::mutex mutex_;
  std::vector<Block> free_;  // oldest first
  int64_t free_bytes_ = 0, taken_bytes_ = 0, most_bytes_ = 0;
};

Blocks& blocks() {
  static Blocks* const all = new Blocks;  // never destroyed: tensors may outlive every other static object
  return *all;
}

}  // namespace

void* take_block(int64_t bytes) { return blocks().take(round_up(bytes)); }
void give_block(void* block, int64_t bytes) { blocks().give(block, round_up(bytes)); }
int64_t free_block_bytes() { return blocks().free_bytes(); }
void release_free_blocks() { blocks().release(); }

}  // namespace sigma::cpu
