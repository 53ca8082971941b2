// Asynchronous copies into shared memory: they happen when the thread waits for them, no earlier, and what
// they will overwrite is poison until then.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>

namespace simt {

class Copies {
 public:
  // 16 bytes, of which the first `bytes` come from `from` and the rest are zero.
  void start(void* to, const void* from, int bytes) {
    std::memset(to, 0xCD, 16);
    pending_.push_back(
        {static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, group_});
  }
  void commit() { ++group_; }
  // Returns when at most `groups` of those committed last are still under way.
  void wait(int groups) {
    while (!pending_.empty() && pending_.front().group + groups < group_) {
      const Copy& c = pending_.front();
      std::memset(c.to, 0, 16);
      if (c.bytes) std::memcpy(c.to, c.from, c.bytes);
      pending_.pop_front();
    }
  }
  void finish() {
    pending_.clear();
    group_ = 0;
  }

 private:
  struct Copy {
    unsigned char* to;
    const unsigned char* from;
    int bytes;
    int64_t group;
  };
  std::deque<Copy> pending_;
  int64_t group_ = 0;  // the one that is being filled
};

Copies& copies();  // of the thread that runs

}  // namespace simt
