// Matrices between bf16, as they are stored, and f32, as they are computed with.
#pragma once

#include <cstdint>

#include "isa/kernels.h"

namespace sigma::cpu {

struct Convert {
  int64_t rows, columns;
  float* wide;  // contiguous
  Bf16* narrow;
  int64_t ld_narrow;
  int threads;
};

void widen(const Convert& c);   // wide = narrow
void narrow(const Convert& c);  // narrow = wide, to the nearest, ties to even

}  // namespace sigma::cpu
