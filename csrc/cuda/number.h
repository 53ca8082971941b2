// Floating-point numbers as they are stored.
#pragma once

#include <cstdint>

namespace sigma::cuda {

struct Bf16 {  // the upper half of a float
  uint16_t bits;
};
struct F16 {  // IEEE half precision
  uint16_t bits;
};

}  // namespace sigma::cuda
