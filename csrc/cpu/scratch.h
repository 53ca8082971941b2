// Working memory: of the threads of one parallel region, and of one call.
#pragma once

#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "memory.h"

namespace sigma::cpu {

// `bytes` for one call, whose contents are undefined: of malloc, or of the kept blocks where malloc would ask
// the system for fresh pages each time.  Small ones are none of the blocks' business: they would push out
// large ones.
class Buffer {
 public:
  // Throws std::bad_alloc.
  explicit Buffer(int64_t bytes) : bytes_(bytes) {
    if (bytes == 0) return;
    begin_ = is_block() ? take_block(bytes) : std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!begin_) throw std::bad_alloc();
  }
  ~Buffer() {
    if (is_block())
      give_block(begin_, bytes_);
    else
      std::free(begin_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(begin_);
  }

 private:
  bool is_block() const { return bytes_ >= int64_t{32} << 20; }

  int64_t bytes_;
  void* begin_ = nullptr;
};

// `bytes` for each thread of a parallel region.  Taken before it, since no exception may leave one.
class Scratch {
 public:
  // Throws std::bad_alloc.
  Scratch(int threads, int64_t bytes) : stride_((bytes + 63) / 64 * 64), all_(threads * stride_) {}

  // This thread's part, from its element `first` of four bytes on; null where there is none.
  template <class T>
  T* mine(int64_t first = 0) const {
    static_assert(sizeof(T) == 4);
    char* const begin = all_.as<char>();
    return begin ? reinterpret_cast<T*>(begin + omp_get_thread_num() * stride_) + first : nullptr;
  }

 private:
  int64_t stride_;
  Buffer all_;
};

}  // namespace sigma::cpu
