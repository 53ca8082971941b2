// The CUDA kernels as a Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace sigma::cuda {

void bind(pybind11::module_& m);

}  // namespace sigma::cuda
