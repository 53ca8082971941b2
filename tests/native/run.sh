#!/usr/bin/env bash
# The native kernels under ASan and UBSan, in every instruction set of this processor.
# TSan watches the memory blocks, which std::threads share.  It can't watch the kernels: GCC's OpenMP runtime is not
# instrumented, so every parallel region would be a false report.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
for sanitizers in address,undefined thread; do
  cmake -S . -B "$build/$sanitizers" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DSIGMA_TESTS=ON \
    -DSIGMA_SANITIZE=$sanitizers -DSIGMA_WERROR=ON >/dev/null
  cmake --build "$build/$sanitizers" -j "$(nproc)" --target test_kernels >/dev/null
done
"$build/thread/test_kernels" blocks
ran=0
for isa in base avx2 avx512 avx512bf16; do
  if output=$(SIGMA_ISA=$isa "$build/address,undefined/test_kernels" 2>&1); then
    echo "$output"
    ran=$((ran + 1))
  elif grep -q "can't run here" <<<"$output"; then
    echo "$isa: not on this processor"
  else
    echo "$output"
    exit 1
  fi
done
[ "$ran" -gt 0 ]
