// The bindings of csrc/cuda over the emulator, for tests/test_cuda.py.
#include "cuda/bindings.h"

PYBIND11_MODULE(simt_kernels, m) { sigma::cuda::bind(m); }
