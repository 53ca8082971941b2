// sigma_kernels._C.cuda: addresses, sizes, strides and a stream from Python into the launchers.  Arguments
// are trusted: the ops layer has checked them.  What a launcher reports becomes a RuntimeError.
#include "bindings.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "fixed_work.h"
#include "group.h"
#include "grouped_gemm.h"
#include "number.h"
#include "route.h"
#include "rows.h"
#include "swiglu.h"

namespace py = pybind11;

namespace sigma::cuda {
namespace {

using Address = uintptr_t;  // Tensor.data_ptr(), or a stream; 0 where the argument is optional and absent

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}
cudaStream_t on(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

void check(const char* what, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

auto no_gil() { return py::call_guard<py::gil_scoped_release>(); }

// 13000 is 13.0.
template <class Get>
std::string version(Get get) {
  int number = 0;
  if (get(&number) != cudaSuccess || number == 0) return "";
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

void bind_route(py::module_& m) {
  m.def("route_workspace", &route_workspace);
  m.def("group_workspace", &group_workspace);
  m.attr("max_experts") = kMaxExperts;
  m.attr("max_groups") = kMaxGroups;
  m.def(
      "route",
      [](int64_t T, int E, int k, Address logits, int64_t ld, Address bias, bool is_softmax,
         bool is_normalized, Address indices, Address weights, Address counts, Address offsets,
         Address row_map, Address workspace, bool sums_softmax, Address probabilities, Address square,
         Address stream) {
        check("route", route({.T = T,
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
                              .workspace = at<int32_t>(workspace),
                              .sums_softmax = sums_softmax,
                              .probabilities = at<float>(probabilities),
                              .square = at<float>(square)},
                             on(stream)));
      },
      no_gil());
  m.def(
      "route_backward",
      [](int64_t T, int E, int k, Address logits, int64_t ld, bool is_softmax, bool is_normalized,
         Address indices, Address grad_weights, Address grad_logits, bool sums_softmax,
         Address grad_probabilities, Address grad_square, Address stream) {
        check("route_backward", route_backward({.T = T,
                                                .E = E,
                                                .k = k,
                                                .logits = at<float>(logits),
                                                .ld = ld,
                                                .is_softmax = is_softmax,
                                                .is_normalized = is_normalized,
                                                .indices = at<int32_t>(indices),
                                                .grad_weights = at<float>(grad_weights),
                                                .grad_logits = at<float>(grad_logits),
                                                .sums_softmax = sums_softmax,
                                                .grad_probabilities = at<float>(grad_probabilities),
                                                .grad_square = at<float>(grad_square)},
                                               on(stream)));
      },
      no_gil());
  m.def(
      "group_by_expert",
      [](int64_t R, int E, Address indices, Address counts, Address offsets, Address row_map,
         Address workspace, Address stream) {
        check("group_by_expert", group_by_expert({.R = R,
                                                  .E = E,
                                                  .indices = at<int32_t>(indices),
                                                  .counts = at<int32_t>(counts),
                                                  .offsets = at<int32_t>(offsets),
                                                  .row_map = at<int32_t>(row_map),
                                                  .workspace = at<int32_t>(workspace)},
                                                 on(stream)));
      },
      no_gil());
}

void bind_rows(py::module_& m) {
  m.def(
      "copy_rows",
      [](int64_t R, int64_t row_bytes, Address x, int64_t ldx, Address x_index, int x_divisor, Address out,
         int64_t ld_out, Address out_index, Address stream) {
        check("copy_rows", copy_rows({.R = R,
                                      .row_bytes = row_bytes,
                                      .x = at<char>(x),
                                      .ldx = ldx,
                                      .x_index = at<int32_t>(x_index),
                                      .x_divisor = x_divisor,
                                      .out = at<char>(out),
                                      .ld_out = ld_out,
                                      .out_index = at<int32_t>(out_index)},
                                     on(stream)));
      },
      no_gil());
  m.def(
      "invert",
      [](Address row_map, int64_t R, Address row_of_slot, Address stream) {
        check("invert", invert(at<int32_t>(row_map), R, at<int32_t>(row_of_slot), on(stream)));
      },
      no_gil());
  m.def(
      "pack",
      [](int64_t R, int64_t row_bytes, int E, int ranks, int k, int64_t capacity, Address x,
         int64_t ldx_bytes, Address offsets, Address row_map, Address out, Address place_of_slot,
         Address rank_counts, Address dropped, Address stream) {
        check("pack", pack({.R = R,
                            .row_bytes = row_bytes,
                            .E = E,
                            .ranks = ranks,
                            .k = k,
                            .capacity = capacity,
                            .x = at<char>(x),
                            .ldx_bytes = ldx_bytes,
                            .offsets = at<int32_t>(offsets),
                            .row_map = at<int32_t>(row_map),
                            .out = at<char>(out),
                            .place_of_slot = at<int32_t>(place_of_slot),
                            .rank_counts = at<int32_t>(rank_counts),
                            .dropped = at<int32_t>(dropped)},
                           on(stream)));
      },
      no_gil());
  m.def(
      "plan_receive",
      [](int ranks, int experts, int64_t capacity, int64_t rows, Address counts, Address offsets,
         Address place_of_row, Address stream) {
        check("plan_receive", plan_receive({.ranks = ranks,
                                            .experts = experts,
                                            .capacity = capacity,
                                            .rows = rows,
                                            .counts = at<int32_t>(counts),
                                            .offsets = at<int32_t>(offsets),
                                            .place_of_row = at<int32_t>(place_of_row)},
                                           on(stream)));
      },
      no_gil());
}

template <class T>
void bind_combine(py::module_& m, const std::string& suffix) {
  m.def(("combine" + suffix).c_str(),
        [](int64_t tokens, int64_t H, int k, Address y, int64_t ldy, Address row_of_slot, Address weights,
           Address out, Address stream) {
          check("combine", combine(Combine<T>{.tokens = tokens,
                                              .H = H,
                                              .k = k,
                                              .y = at<T>(y),
                                              .ldy = ldy,
                                              .row_of_slot = at<int32_t>(row_of_slot),
                                              .weights = at<float>(weights),
                                              .out = at<T>(out),
                                              .ld_out = H},
                                   on(stream)));
        },
        no_gil());
  m.def(("combine_backward" + suffix).c_str(),
        [](int64_t R, int64_t H, int k, Address grad_out, int64_t ld_grad, Address y, int64_t ldy,
           Address row_map, Address weights, Address grad_y, Address grad_weights, Address stream) {
          check("combine_backward",
                combine_backward(CombineBackward<T>{.R = R,
                                                    .H = H,
                                                    .k = k,
                                                    .grad_out = at<T>(grad_out),
                                                    .ld_grad = ld_grad,
                                                    .y = at<T>(y),
                                                    .ldy = ldy,
                                                    .row_map = at<int32_t>(row_map),
                                                    .weights = at<float>(weights),
                                                    .grad_y = at<T>(grad_y),
                                                    .grad_weights = at<float>(grad_weights)},
                                 on(stream)));
        },
        no_gil());
}

template <class T>
void bind_products(py::module_& m, const std::string& suffix) {
  m.def(("grouped_gemm" + suffix).c_str(),
        [](int64_t R, int E, int64_t N, int64_t K, Address offsets, Address x, int64_t ldx, Address x_index,
           int x_divisor, Address w, int64_t w_expert, int64_t w_row, bool is_transposed, Address y,
           Address y_index, Address scale, Address stream) {
          check("grouped_gemm",
                grouped_gemm(GroupedGemm<T>{.R = R,
                                            .E = E,
                                            .N = N,
                                            .K = K,
                                            .offsets = at<int32_t>(offsets),
                                            .x = {at<T>(x), ldx, at<int32_t>(x_index), x_divisor},
                                            .w = at<T>(w),
                                            .w_expert = w_expert,
                                            .w_row = w_row,
                                            .is_transposed = is_transposed,
                                            .y = {at<T>(y), N, at<int32_t>(y_index), 1},
                                            .scale = at<float>(scale),
                                            .slot_of_row = at<int32_t>(y_index)},
                             on(stream)));
        },
        no_gil());
  m.def(
      ("grouped_outer" + suffix).c_str(),
      [](int E, int64_t A, int64_t B, Address offsets, Address a, int64_t lda, Address a_index, int a_divisor,
         Address b, int64_t ldb, Address b_index, int b_divisor, Address out, bool adds, Address stream) {
        check("grouped_outer",
              grouped_outer(GroupedOuter<T>{.E = E,
                                            .A = A,
                                            .B = B,
                                            .offsets = at<int32_t>(offsets),
                                            .a = {at<T>(a), lda, at<int32_t>(a_index), a_divisor},
                                            .b = {at<T>(b), ldb, at<int32_t>(b_index), b_divisor},
                                            .out = at<T>(out),
                                            .out_expert = A * B,
                                            .out_row = B,
                                            .adds = adds},
                            on(stream)));
      },
      no_gil());
  m.def(("swiglu" + suffix).c_str(),
        [](int64_t R, int64_t I, Address gate_up, Address hidden, Address stream) {
          check("swiglu",
                swiglu(Swiglu<T>{.R = R, .I = I, .gate_up = at<T>(gate_up), .hidden = at<T>(hidden)},
                       on(stream)));
        },
        no_gil());
  m.def(("swiglu_backward" + suffix).c_str(),
        [](int64_t R, int64_t I, Address gate_up, Address grad_hidden, Address weights, Address slot_of_row,
           Address grad_gate_up, Address weighted, Address grad_weights, Address stream) {
          check("swiglu_backward", swiglu_backward(SwigluBackward<T>{.R = R,
                                                                     .I = I,
                                                                     .gate_up = at<T>(gate_up),
                                                                     .grad_hidden = at<T>(grad_hidden),
                                                                     .weights = at<float>(weights),
                                                                     .slot_of_row = at<int32_t>(slot_of_row),
                                                                     .grad_gate_up = at<T>(grad_gate_up),
                                                                     .weighted = at<T>(weighted),
                                                                     .grad_weights = at<float>(grad_weights)},
                                                   on(stream)));
        },
        no_gil());
}

// Stamps are int64 [blocks, rounds, 4]: begin and end in ns, cycles, multiprocessor.
void bind_fixed_work(py::module_& m) {
  static_assert(sizeof(Stamp) == 4 * sizeof(int64_t));
  m.attr("work_threads") = kWorkThreads;
  m.def(
      "run_arithmetic",
      [](int blocks, int64_t rounds, int64_t steps, Address stamps, Address sums, Address stream) {
        check("run_arithmetic",
              run_arithmetic({blocks, rounds, steps, at<Stamp>(stamps), at<float>(sums)}, on(stream)));
      },
      no_gil());
  m.def(
      "run_copying",
      [](int blocks, int64_t rounds, int64_t slice, Address from, Address to, Address stamps,
         Address stream) {
        check("run_copying",
              run_copying({blocks, rounds, slice, at<uint4>(from), at<uint4>(to), at<Stamp>(stamps)},
                          on(stream)));
      },
      no_gil());
}

}  // namespace

void bind(py::module_& m) {
  m.def("runtime_version", [] { return version(cudaRuntimeGetVersion); });
  m.def("driver_version", [] { return version(cudaDriverGetVersion); }, "Empty where there is no driver.");
  bind_route(m);
  bind_rows(m);
  bind_fixed_work(m);
  bind_combine<float>(m, "");
  bind_combine<Bf16>(m, "_bf16");
  bind_combine<F16>(m, "_f16");
  bind_products<Bf16>(m, "_bf16");
  bind_products<F16>(m, "_f16");
}

}  // namespace sigma::cuda
