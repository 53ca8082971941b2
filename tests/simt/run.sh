#!/usr/bin/env bash
# The CUDA kernels on the CPU: every test of the emulator and of csrc/cuda under ASan and UBSan; `run.sh fast`: at -O2.
set -euo pipefail
cd "$(dirname "$0")"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

build_and_run() { # name, then options of cmake
  cmake -S . -B "$build/$1" "${@:2}" >/dev/null
  cmake --build "$build/$1" -j "$(nproc)" >"$build/log" || { cat "$build/log" && return 1; }
  find "$build/$1" -maxdepth 1 -name 'test_*' -type f | sort | xargs -P "$(nproc)" -I {} sh -c '{} || exit 255'
}
if [ "${1-}" = fast ]; then
  echo "simt, -O2"
  build_and_run fast -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS=-O2
else
  echo "simt, ASan and UBSan"
  build_and_run checked -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="-O1 -g1" -DSIGMA_SANITIZE=address,undefined
fi
