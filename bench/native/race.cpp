// Two versions of the CPU schedules in f32, call by call in turn: race BEFORE.so AFTER.so ROUNDS.  See
// race.sh.  Exit code 1 if they do not compute the same.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "schedules.h"

namespace {

using Run = void(const Product&);

Run* load(const char* path) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void* const run = library ? dlsym(library, "run") : nullptr;
  if (!run) {
    std::fprintf(stderr, "%s\n", dlerror());
    std::exit(1);
  }
  return reinterpret_cast<Run*>(run);
}

// Whole pages of 4 KiB, as malloc gives a large block: sixteen floats into the first.
float* floats(int64_t n) {
  void* const block = mmap(nullptr, (n + 16) * 4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (block == MAP_FAILED) {
    std::perror("race: memory");
    std::exit(1);
  }
  return static_cast<float*>(block) + 16;
}

// Multiples of 2^-8 within [-0.5, 0.5): sums of up to 1,024 products are exact in f32, whatever their order.
// No row is like another (Knuth's multiplicative hash), so that one in another's place is seen.
void fill(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    x[i] = static_cast<float>(static_cast<uint32_t>(i) * 2654435761u >> 24) / 256 - 0.5f;
}

double middle(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// Ends the race unless both make the same of the same memory, all `results` floats of it.
void compare(const char* name, Run* const (&versions)[2], const Product& p, float* result, int64_t results) {
  std::vector<float> before(results);
  for (Run* const run : versions) {
    std::copy_n(result, results, before.data());
    if (p.adds)
      fill(result, results);
    else
      std::fill_n(result, results, std::numeric_limits<float>::quiet_NaN());
    run(p);
  }
  for (int64_t i = 0; i < results; ++i)
    if (!(before[i] == result[i])) {  // what nobody has written is NaN, and equals nothing
      std::fprintf(
          stderr, "race: %s of E=%ld N=%ld K=%ld must be the same, found %.9g before and %.9g after at %ld\n",
          name, long{p.E}, long{p.N}, long{p.K}, before[i], result[i], long{i});
      std::exit(1);
    }
}

void race(const char* name, Run* const (&versions)[2], Product p, int64_t T, int rounds) {
  std::vector<int32_t> offsets(p.E + 1);
  for (int64_t e = 0; e <= p.E; ++e) offsets[e] = static_cast<int32_t>(e * T / p.E);
  const int64_t sizes[] = {T * p.K, p.E * p.N * p.K, T * p.N};
  float* const x = floats(sizes[0]);
  p.offsets = offsets.data(), p.x = x, p.w = floats(sizes[1]), p.y = floats(sizes[2]);
  float* const blocks[] = {x, p.w, p.y};
  for (int i = 0; i < 3; ++i) fill(blocks[i], sizes[i]);
  const int result = p.is_outer ? 1 : 2;
  compare(name, versions, p, blocks[result], sizes[result]);
  const int64_t calls = std::max<int64_t>(1, 400'000'000 / (T * p.N * p.K));  // of short ones several a turn
  std::vector<double> ms[2], ratio;
  for (int round = 0; round < rounds; ++round) {
    double took[2];
    for (const int v : {round % 2, 1 - round % 2}) {  // who comes first finds other caches
      const auto began = std::chrono::steady_clock::now();
      for (int64_t i = 0; i < calls; ++i) versions[v](p);
      took[v] = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - began).count() /
                static_cast<double>(calls);
      ms[v].push_back(took[v]);
    }
    ratio.push_back(took[1] / took[0]);
  }
  std::printf("| %s | %ld | %ld | %ld | %ld | %d | %.2f | %.2f | %.2f |\n", name, long{p.E}, long{p.N},
              long{p.K}, long{T}, p.threads, middle(ms[0]), middle(ms[1]), middle(ratio));
  std::fflush(stdout);
  for (int i = 0; i < 3; ++i) munmap(blocks[i] - 16, (sizes[i] + 16) * 4);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return std::fprintf(stderr, "race BEFORE.so AFTER.so ROUNDS\n"), 2;
  Run* const versions[2] = {load(arguments[1]), load(arguments[2])};
  const int rounds = std::max(1, std::atoi(arguments[3]));
  std::printf("| product | E | N | K | T | threads | before, ms | after, ms | after / before |\n");
  std::printf("|---|---|---|---|---|---|---|---|---|\n");
  struct Case {
    int64_t E, N, K, T;
    int threads;
  };
  // Shape A's two products; one thread; weights in the last cache, and one thread; few rows an expert; many.
  for (const Case c : {Case{96, 1024, 1024, 2048, 2},
                       {96, 1024, 512, 2048, 2},
                       {96, 1024, 1024, 2048, 1},
                       {2, 1024, 1024, 42, 2},
                       {2, 1024, 1024, 42, 1},
                       {96, 1024, 1024, 96, 2},
                       {96, 1024, 1024, 288, 2},
                       {8, 1024, 1024, 4096, 2}}) {
    const Product forward{.E = c.E, .N = c.N, .K = c.K, .threads = c.threads};
    Product input = forward, weight = forward, added = forward;
    input.is_transposed = weight.is_outer = added.is_outer = added.adds = true;
    race("x @ W.T", versions, forward, c.T, rounds);
    race("x @ W", versions, input, c.T, rounds);
    race("a.T @ b", versions, weight, c.T, rounds);
    race("a.T @ b, added", versions, added, c.T, rounds);
  }
}
