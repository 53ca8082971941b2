// A thread's own working memory, kept from task to task.
#pragma once

#include <cstdint>
#include <vector>

namespace sigma::cpu {

// Room for n elements of T, contents undefined, until this thread asks again for the same T.
template <class T>
T* scratch(int64_t n) {
  thread_local std::vector<T> memory;
  if (static_cast<int64_t>(memory.size()) < n) memory.resize(n);
  return memory.data();
}

}  // namespace sigma::cpu
