// sigma_kernels._C: pointers, shapes and strides from Python into the kernels.  Arguments are trusted: the
// ops layer has checked them.  The GIL is dropped around every call.
#include "noise/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <string>

#include "cpu/convert.h"
#include "cpu/dispatch.h"
#include "cpu/experts.h"
#include "cpu/grouped_gemm.h"
#include "cpu/memory.h"
#include "cpu/permute.h"
#include "cpu/route.h"
#if defined(SIGMA_CUDA)
#include "cuda/bindings.h"
#endif

namespace py = pybind11;
using namespace sigma::cpu;
using sigma::Bf16;
using sigma::F16;
using sigma::Int8;

namespace {

using Address = uintptr_t;  // Tensor.data_ptr(); 0 where the argument is optional and absent

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

struct Block {
  explicit Block(int64_t n) : bytes(n), begin(take_block(n)) {
    if (!begin) throw std::bad_alloc();
  }
  ~Block() { give_block(begin, bytes); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  const int64_t bytes;
  void* const begin;
};

auto no_gil() { return py::call_guard<py::gil_scoped_release>(); }

// X and W: see experts.h.
template <class X, class W>
void bind_experts_forward(py::module_& m, const std::string& suffix) {
  py::class_<Experts<X, W>>(m, ("Experts" + suffix).c_str(),
                            "The shared arguments of experts_forward and experts_backward.")
      .def(py::init([](int64_t T, int64_t H, int64_t I, int64_t E, int k, Address x, int64_t ldx,
                       Address offsets, Address row_map, Address weights, Address gate_up_proj,
                       int64_t gate_up_expert, int64_t gate_up_row, Address down_proj, int64_t down_expert,
                       int64_t down_row, Address gate_up, int threads, Address gate_up_scale,
                       Address down_scale, Address row_of_slot) {
        return Experts<X, W>{.T = T,
                             .H = H,
                             .I = I,
                             .E = E,
                             .k = k,
                             .x = at<X>(x),
                             .ldx = ldx,
                             .offsets = at<int32_t>(offsets),
                             .row_map = at<int32_t>(row_map),
                             .weights = at<float>(weights),
                             .gate_up_proj = at<W>(gate_up_proj),
                             .gate_up_expert = gate_up_expert,
                             .gate_up_row = gate_up_row,
                             .down_proj = at<W>(down_proj),
                             .down_expert = down_expert,
                             .down_row = down_row,
                             .gate_up = at<float>(gate_up),
                             .threads = threads,
                             .gate_up_scale = at<float>(gate_up_scale),
                             .down_scale = at<float>(down_scale),
                             .row_of_slot = at<int32_t>(row_of_slot)};
      }));

  m.def(("experts_inference" + suffix).c_str(),
        [](const Experts<X, W>& e, Address index, bool is_long, Address weights, Address out) {
          const auto* const w = at<RoutingWeight<W>>(weights);
          return is_long ? experts_inference(e, at<int64_t>(index), w, at<X>(out))
                         : experts_inference(e, at<int32_t>(index), w, at<X>(out));
        },
        no_gil());

  m.def(("experts_forward" + suffix).c_str(),
        [](const Experts<X, W>& e, Address hidden, Address by_slot, Address out) {
          experts_forward(e, ExpertsForward<X>{
                                 .hidden = at<X>(hidden), .by_slot = at<float>(by_slot), .out = at<X>(out)});
        },
        no_gil());
}

// G: how the weights' gradients are stored.
template <class X, class W, class G>
void bind_experts_backward(py::module_& m, const std::string& suffix) {
  m.def(("experts_backward" + suffix).c_str(),
        [](const Experts<X, W>& e, Address grad_out, int64_t ld_grad, Address grad_gate_up, Address hidden,
           Address by_slot, Address grad_weights, Address grad_x, Address grad_gate_up_proj,
           Address grad_down_proj, bool adds) {
          experts_backward(e, ExpertsBackward<X, W, G>{.grad_out = at<X>(grad_out),
                                                       .ld_grad = ld_grad,
                                                       .grad_gate_up = at<X>(grad_gate_up),
                                                       .hidden = at<X>(hidden),
                                                       .by_slot = at<float>(by_slot),
                                                       .grad_weights = at<float>(grad_weights),
                                                       .grad_x = at<X>(grad_x),
                                                       .grad_gate_up_proj = at<G>(grad_gate_up_proj),
                                                       .grad_down_proj = at<G>(grad_down_proj),
                                                       .adds = adds});
        },
        no_gil());
}

template <class X, class W>
void bind_gemms(py::module_& m, const std::string& suffix) {
  m.def(("grouped_gemm" + suffix).c_str(),
        [](int64_t E, int64_t N, int64_t K, Address offsets, Address x, int64_t ldx, Address w,
           int64_t w_expert, int64_t w_row, Address y, bool is_transposed, int threads) {
          const GroupedGemm<X, W, X> g{.E = E,
                                       .N = N,
                                       .K = K,
                                       .offsets = at<int32_t>(offsets),
                                       .x = {at<X>(x), ldx},
                                       .w = at<W>(w),
                                       .w_expert = w_expert,
                                       .w_row = w_row,
                                       .y = {at<X>(y), N},
                                       .scale = nullptr,
                                       .slot_of_row = nullptr,
                                       .threads = threads};
          is_transposed ? grouped_gemm_nt(g) : grouped_gemm_nn(g);
        },
        no_gil());

  m.def(("grouped_outer" + suffix).c_str(),
        [](int64_t E, int64_t A, int64_t B, Address offsets, Address a, int64_t lda, Address b, int64_t ldb,
           Address out, bool adds, int threads) {
          grouped_outer(GroupedOuter<X, W>{.E = E,
                                           .A = A,
                                           .B = B,
                                           .offsets = at<int32_t>(offsets),
                                           .a = {at<X>(a), lda},
                                           .b = {at<X>(b), ldb},
                                           .out = at<W>(out),
                                           .out_expert = A * B,
                                           .out_row = B,
                                           .adds = adds,
                                           .threads = threads});
        },
        no_gil());

  bind_experts_forward<X, W>(m, suffix);
  bind_experts_backward<X, W, W>(m, suffix);
  if constexpr (!std::is_same_v<W, float>) bind_experts_backward<X, W, float>(m, suffix + "_f32");
}

template <class Y>
void bind_combine(py::module_& m, const std::string& suffix) {
  m.def(("combine" + suffix).c_str(),
        [](int64_t T, int64_t H, int k, Address y, int64_t ldy, Address row_of_slot, Address weights,
           Address out, int threads) {
          combine(Combine<Y, Y>{.T = T,
                                .H = H,
                                .k = k,
                                .y = at<Y>(y),
                                .ldy = ldy,
                                .row_of_slot = at<int32_t>(row_of_slot),
                                .weights = at<float>(weights),
                                .out = at<Y>(out),
                                .threads = threads});
        },
        no_gil());

  m.def(("combine_backward" + suffix).c_str(),
        [](int64_t R, int64_t H, int k, Address grad_out, int64_t ld_grad, Address y, int64_t ldy,
           Address row_map, Address weights, Address grad_y, Address grad_weights, int threads) {
          combine_backward(CombineBackward<Y>{.R = R,
                                              .H = H,
                                              .k = k,
                                              .grad_out = at<Y>(grad_out),
                                              .y = at<Y>(y),
                                              .ld_grad = ld_grad,
                                              .ldy = ldy,
                                              .row_map = at<int32_t>(row_map),
                                              .weights = at<float>(weights),
                                              .grad_y = at<Y>(grad_y),
                                              .grad_weights = at<float>(grad_weights),
                                              .threads = threads});
        },
        no_gil());
}

template <class T>
void bind_convert(py::module_& m, const std::string& suffix) {
  m.def(("widen" + suffix).c_str(),
        [](int64_t rows, int64_t columns, Address x, int64_t ldx, Address y, int threads) {
          widen(Convert<T>{.rows = rows,
                           .columns = columns,
                           .wide = at<float>(y),
                           .narrow = at<T>(x),
                           .ld_narrow = ldx,
                           .threads = threads});
        },
        no_gil());
  m.def(("narrow" + suffix).c_str(),
        [](int64_t rows, int64_t columns, Address x, Address y, int threads) {
          narrow(Convert<T>{.rows = rows,
                            .columns = columns,
                            .wide = at<float>(x),
                            .narrow = at<T>(y),
                            .ld_narrow = columns,
                            .threads = threads});
        },
        no_gil());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of sigma_kernels, by address. Use sigma_kernels.ops instead.";

  m.def("isa", [] { return std::string(sigma::cpu::kernels().name); });
  m.def("supported_isas", &supported_isas);
  m.def("lanes", [] { return sigma::cpu::kernels().lanes; });
  m.def("multiplies_bf16", [] { return sigma::cpu::kernels().multiplies_bf16; });

  py::class_<Block>(m, "Block", py::buffer_protocol(), "Memory for one large tensor, kept when it is freed.")
      .def(py::init<int64_t>())
      .def_buffer([](const Block& b) { return py::buffer_info(static_cast<uint8_t*>(b.begin), b.bytes); });
  m.def("free_block_bytes", &free_block_bytes);
  m.def("release_free_blocks", &release_free_blocks, no_gil());

  m.def(
      "route",
      [](int64_t T, int64_t E, int k, Address logits, int64_t ld, Address bias, bool is_softmax,
         bool is_normalized, Address indices, Address weights, Address counts, Address offsets,
         Address row_map, int threads, bool sums_softmax, Address probabilities, Address square) {
        route({.T = T,
               .E = E,
               .k = k,
               .logits = at<float>(logits),
               .ld = ld,
               .bias = at<float>(bias),
               .is_softmax = is_softmax,
               .is_normalized = is_normalized,
               .indices = at<int32_t>(indices),
               .weights = at<float>(weights),
               .counts = at<int32_t>(counts),
               .offsets = at<int32_t>(offsets),
               .row_map = at<int32_t>(row_map),
               .threads = threads,
               .sums_softmax = sums_softmax,
               .probabilities = at<float>(probabilities),
               .square = at<float>(square)});
      },
      no_gil());

  m.def(
      "route_backward",
      [](int64_t T, int64_t E, int k, Address logits, int64_t ld, bool is_softmax, bool is_normalized,
         Address indices, Address grad_weights, Address grad_logits, int threads, bool sums_softmax,
         Address grad_probabilities, Address grad_square) {
        route_backward({.T = T,
                        .E = E,
                        .k = k,
                        .logits = at<float>(logits),
                        .ld = ld,
                        .is_softmax = is_softmax,
                        .is_normalized = is_normalized,
                        .indices = at<int32_t>(indices),
                        .grad_weights = at<float>(grad_weights),
                        .grad_logits = at<float>(grad_logits),
                        .threads = threads,
                        .sums_softmax = sums_softmax,
                        .grad_probabilities = at<float>(grad_probabilities),
                        .grad_square = at<float>(grad_square)});
      },
      no_gil());

  m.def(
      "group_by_expert",
      [](Address indices, int64_t R, int64_t E, Address counts, Address offsets, Address row_map,
         int threads) {
        return group_by_expert(at<int32_t>(indices), R, E, at<int32_t>(counts), at<int32_t>(offsets),
                               at<int32_t>(row_map), threads);
      },
      no_gil());

  m.def(
      "rises", [](Address offsets, int64_t E, int64_t R) { return rises(at<int32_t>(offsets), E, R); },
      no_gil());

  m.def(
      "wrong_row",
      [](Address row_map, int64_t R, int64_t slots) { return wrong_row(at<int32_t>(row_map), R, slots); },
      no_gil());

  m.def(
      "permute",
      [](int64_t R, int64_t row_bytes, int k, Address x, int64_t ldx_bytes, Address row_map, Address out,
         int threads) {
        permute({.R = R,
                 .row_bytes = row_bytes,
                 .k = k,
                 .x = at<char>(x),
                 .ldx_bytes = ldx_bytes,
                 .row_map = at<int32_t>(row_map),
                 .out = at<char>(out),
                 .threads = threads});
      },
      no_gil());

  m.def(
      "invert",
      [](Address row_map, int64_t R, Address row_of_slot) {
        invert(at<int32_t>(row_map), R, at<int32_t>(row_of_slot));
      },
      no_gil());

  bind_gemms<float, float>(m, "");
  bind_gemms<float, Bf16>(m, "_widened");
  bind_gemms<float, F16>(m, "_f16");
  bind_experts_forward<float, Int8>(m, "_int8");
  bind_gemms<Bf16, Bf16>(m, "_bf16");
  bind_combine<float>(m, "");
  bind_combine<Bf16>(m, "_bf16");
  bind_combine<F16>(m, "_f16");
  bind_convert<Bf16>(m, "_bf16");
  bind_convert<F16>(m, "_f16");

  auto noise = m.def_submodule("noise", "Timed loops of csrc/noise.");
  sigma::noise::bind(noise);

#if defined(SIGMA_CUDA)
  auto cuda = m.def_submodule("cuda", "Kernels of csrc/cuda, on a stream.");
  sigma::cuda::bind(cuda);
#endif
}
