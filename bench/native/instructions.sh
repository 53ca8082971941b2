#!/usr/bin/env bash
# docs/results/instructions.md: instructions of each micro-kernel in the wide instruction sets of this processor.
# The tables of those that it has not stay as they are.  Takes minutes: a step costs microseconds.
set -euo pipefail
cd "$(dirname "$0")/../.."
page=${1:-docs/results/instructions.md}
build=$(mktemp -d)
trap 'rm -rf "$build" "$page.new"' EXIT
cmake -S . -B "$build" -DCMAKE_BUILD_TYPE=Release -DSIGMA_TESTS=ON >/dev/null
cmake --build "$build" -j "$(nproc)" --target count_instructions >/dev/null
made="Made on $(date +%F) of $(git describe --always --dirty): $(c++ --version | head -1)."
section() { # of the page as it is
  [ ! -e "$page" ] || awk -v start="## $1," '/^## / {inside = index($0, start) == 1} inside' "$page"
}
{
  cat <<EOF
# Instructions of the micro-kernels

Made by \`bench/native/instructions.sh\`. Each call was stepped through, so the figures do not depend on what else the
machine does. \`multiply-adds\`: vector instructions that the FLOPs need at the width of the instruction set;
\`least\`: for each of them, what a loop of multiply-adds and loads of their operands takes in the largest block.
Everything is 256 deep; tasks have 64 columns and the 21 rows an expert of shape A. Below \`least\` a load is part of its
multiply-add; above it, steps are counted (5 instructions for the 12 multiply-adds and 7 loads of a step of 3 x 4), rows
do not divide into largest blocks, sums are added up across lanes and stored, weights are widened, paired or asked for
ahead.

EOF
  for isa in avx2 avx512 avx512bf16; do
    if SIGMA_ISA=$isa "$build/count_instructions" >"$build/table" 2>"$build/errors"; then
      head -n 1 "$build/table"
      printf '\n%s\n' "$made"
      tail -n +2 "$build/table"
    elif grep -q "can't run here" "$build/errors"; then
      echo "$isa: not on this processor" >&2
      section "$isa"
    else
      cat "$build/errors" >&2
      exit 1
    fi
  done
} >"$page.new"
mv "$page.new" "$page"
