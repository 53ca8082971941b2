// The timed loops as a Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace sigma::noise {

void bind(pybind11::module_& m);

}  // namespace sigma::noise
