#!/usr/bin/env bash
# The native kernels under ASan and UBSan, in every instruction set of this processor; those of 16 lanes on one with
# AVX2 too, lowered by the compiler.
# TSan watches the memory blocks, which std::threads share; the kernels, which OpenMP shares out, in run_tsan.sh, with
# clang, since GCC's OpenMP runtime is not instrumented.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
# Checks in code that cannot run would only be compiled, which takes minutes.
sanitized=base
for isa in avx2:avx2 lowered16:avx2 avx512:avx512dq avx512bf16:avx512_bf16; do
  if grep -qw "${isa#*:}" /proc/cpuinfo; then sanitized+=";${isa%:*}"; fi
done
build_under() { # sanitizers, targets
  cmake -S . -B "$build/$1" -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="-O1 -g1" -DSIGMA_TESTS=ON -DSIGMA_SANITIZE="$1" \
    -DSIGMA_SANITIZED="$sanitized" -DSIGMA_WERROR=ON >/dev/null
  cmake --build "$build/$1" -j "$(nproc)" --target "${@:2}" >/dev/null
}
build_under thread test_blocks
"$build/thread/test_blocks"
build_under address,undefined test_kernels test_blocks test_noise
"$build/address,undefined/test_blocks"
"$build/address,undefined/test_noise"
ran=0
for isa in base avx2 lowered16 avx512 avx512bf16; do
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
