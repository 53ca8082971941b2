#!/usr/bin/env bash
# The kernels' parallel regions under ThreadSanitizer.  GCC's OpenMP runtime is not instrumented, so each region would
# be a false report; clang's tells Archer what its barriers and reductions order (Atzeni et al. 2016, IPDPS), and Archer
# tells TSan.  First a race that was put there must be seen, and a reduction must not.
# Debian 12: apt-get install clang-16 libomp-16-dev libclang-rt-16-dev.  Some minutes; not a part of CI.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
export OMP_TOOL_LIBRARIES=/usr/lib/llvm-16/lib/libarcher.so TSAN_OPTIONS=ignore_noninstrumented_modules=1
[ -e "$OMP_TOOL_LIBRARIES" ]

cat >"$build/race.cpp" <<'END'
int main(int argc, char**) {
  int sum = 0, shared = 0;
#pragma omp parallel for num_threads(4) reduction(+ : sum)
  for (int i = 0; i < 1000; ++i) sum += i;
  if (argc > 1) {
#pragma omp parallel for num_threads(4)
    for (int i = 0; i < 1000; ++i) shared += i;
  }
  return sum + shared == 0;
}
END
clang++-16 -O1 -g -fopenmp=libomp -fsanitize=thread "$build/race.cpp" -o "$build/race"
"$build/race"
if "$build/race" racing 2>/dev/null; then
  echo "a race was not seen: is Archer there?"
  exit 1
fi

# clang 16 does not know f16c by name, and crashes on the bf16 products of AVX-512, which are built without them.
git ls-files -z CMakeLists.txt csrc tests/native bench/native | xargs -0 cp --parents -t "$build"
sed -i 's/ -mavx512bf16//' "$build/CMakeLists.txt"
cmake -S "$build" -B "$build/out" -DCMAKE_CXX_COMPILER=clang++-16 -DCMAKE_BUILD_TYPE=None -DSIGMA_TESTS=ON \
  -DCMAKE_CXX_FLAGS="-O1 -g1 -fopenmp=libomp '-D__builtin_cpu_supports(x)=1' -Wno-unknown-warning-option" \
  -DSIGMA_SANITIZE=thread -DSIGMA_SANITIZED="base;avx2;lowered16" >/dev/null
cmake --build "$build/out" -j "$(nproc)" --target test_kernels >/dev/null
isas=(base)
if grep -qw avx2 /proc/cpuinfo; then isas+=(avx2 lowered16); fi
for isa in "${isas[@]}"; do SIGMA_ISA=$isa "$build/out/test_kernels"; done
