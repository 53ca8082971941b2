#!/usr/bin/env bash
# The native kernels as NEON code, cross-compiled from the same source and run under qemu's user-mode emulation.
# Needs Debian's g++-aarch64-linux-gnu and qemu-user.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cmake -S . -B "$build" -DCMAKE_BUILD_TYPE=Release -DSIGMA_TESTS=ON -DSIGMA_WERROR=ON -DCMAKE_SYSTEM_NAME=Linux \
  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ >/dev/null
cmake --build "$build" -j "$(nproc)" --target test_kernels >/dev/null
aarch64-linux-gnu-objdump -d "$build/test_kernels" | grep -cE 'fmla\s+v[0-9]+\.4s' | sed 's/^/NEON multiply-adds of 4 lanes in the program: /'
echo "aarch64, $(qemu-aarch64 -L /usr/aarch64-linux-gnu "$build/test_kernels")"
