// Matrices between bf16 or f16, as they are stored, and f32, as they are computed with.
#pragma once

#include <cstdint>

#include "isa/kernels.h"

namespace sigma::cpu {

template <class T>
struct Convert {
  int64_t rows, columns;
  float* wide;  // contiguous
  T* narrow;
  int64_t ld_narrow;
  int threads;
};

template <class T>
void widen(const Convert<T>& c);  // wide = narrow
template <class T>
void narrow(const Convert<T>& c);  // narrow = wide, to the nearest, ties to even

}  // namespace sigma::cpu
