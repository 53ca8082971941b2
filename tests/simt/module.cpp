// The bindings of csrc/cuda over the emulator, for tests/test_cuda.py.
#include "cuda/bindings.h"
#include "emulator/block.h"

PYBIND11_MODULE(simt_kernels, m) {
  sigma::cuda::bind(m);
  m.def("set_seed", &simt::set_seed, "0: blocks and threads in order; others shuffle them.");
}
