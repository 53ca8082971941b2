// Which instruction set runs: the widest that this processor has, or the one that SIGMA_ISA names.
#pragma once

#include <string>
#include <vector>

#include "isa/kernels.h"

namespace sigma::cpu {

const Kernels& kernels();                   // throws std::runtime_error if SIGMA_ISA can't be honoured
std::vector<std::string> supported_isas();  // widest first

}  // namespace sigma::cpu
