#!/usr/bin/env bash
# The CPU schedules of a revision against those of the working tree, in turn: bench/native/race.sh REVISION [ROUNDS].
# Prints a Markdown table of medians; the last column is the median of the rounds' ratios.  Exit code 1 if results differ.
set -euo pipefail
cd "$(dirname "$0")/../.."
revision=$(git rev-parse --verify "$1^{commit}")
rounds=${2:-9}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
mkdir "$build/before"
git archive "$revision" | tar x -C "$build/before"
library() { # name, tree
  cmake -S "$2" -B "$build/$1.build" -DCMAKE_BUILD_TYPE=Release >/dev/null
  cmake --build "$build/$1.build" -j "$(nproc)" --target sigma_cpu >/dev/null
  c++ -std=c++20 -O2 -fPIC -fopenmp -fvisibility=hidden -Wno-missing-field-initializers -shared \
    -I "$2/csrc" -I "$2/csrc/cpu" bench/native/schedules.cpp "$build/$1.build/libsigma_cpu.a" \
    -Wl,-Bsymbolic -Wl,--exclude-libs,ALL -o "$build/$1.so"
}
library before "$build/before"
library after .
c++ -std=c++20 -O2 bench/native/race.cpp -ldl -o "$build/race"
echo "$(git rev-parse --short "$revision") against $(git describe --always --dirty), $(c++ --version | head -1), medians of $rounds rounds"
echo
"$build/race" "$build/before.so" "$build/after.so" "$rounds"
