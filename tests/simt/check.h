// What the tests of the emulator and of the kernels share.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "emulator/block.h"

namespace check {

inline int passed = 0, failed = 0;

template <class... A>
void expect(bool is_true, const char* format, A... arguments) {
  is_true ? ++passed : ++failed;
  if (is_true) return;
  std::printf("wrong: ");
  std::printf(format, arguments...);
  std::printf("\n");
}

inline int report(const char* name) {
  std::printf("%s: %d passed, %d failed\n", name, passed, failed);
  return failed != 0;
}

// In order, and shuffled.
template <class F>
void with_seeds(int seeds, F body) {
  for (int seed = 0; seed < seeds; ++seed) {
    simt::set_seed(seed);
    body();
  }
  simt::set_seed(0);
}

// What `body` wrote to stderr on its way to an abnormal end; empty if it ended well.
template <class F>
std::string last_words(F body) {
  int ends[2];
  if (pipe(ends) != 0) return "";
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], 2);
    body();
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char part[4096];
  for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0;) text.append(part, n);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? "" : text + " ";
}

template <class F>
void dies(const char* words, F body) {
  const std::string text = last_words(body);
  const bool is_found = text.find(words) != std::string::npos;
  expect(is_found, "death with '%s', found '%s'", words, text.substr(0, 2000).c_str());
}

inline std::mt19937 generator(1);

inline std::vector<float> random_floats(int64_t n, float low = -1, float high = 1) {
  std::uniform_real_distribution<float> uniform(low, high);
  std::vector<float> out(n);
  for (float& x : out) x = uniform(generator);
  return out;
}

// An output that is left unwritten shows.
inline std::vector<float> unwritten(int64_t n) {
  return std::vector<float>(n, std::numeric_limits<float>::quiet_NaN());
}

template <class T>
bool has_same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// |got - want| <= bound * (typical size + |want|), the typical size being `terms` at least: that of the terms
// whose sum a result is, where they may cancel.
template <class T, class ToFloat>
bool is_close(const std::vector<T>& got, const std::vector<double>& want, double bound, ToFloat to_float,
              double terms = 1e-30) {
  if (got.size() != want.size()) return false;
  double size = 0;
  for (const double w : want) size += w * w / want.size();
  size = std::max(std::sqrt(size), terms);
  for (size_t i = 0; i < want.size(); ++i)
    if (!(std::abs(static_cast<double>(to_float(got[i])) - want[i]) <= bound * (size + std::abs(want[i]))))
      return false;
  return true;
}
inline bool is_close(const std::vector<float>& got, const std::vector<double>& want, double bound,
                     double terms = 1e-30) {
  return is_close(got, want, bound, [](float x) { return x; }, terms);
}

}  // namespace check
