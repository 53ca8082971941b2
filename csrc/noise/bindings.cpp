// Addresses and sizes from Python into the loops, which run without the GIL.  Arguments are trusted:
// sigma_noise/loops.py has checked them and keeps the memory alive.
#include "bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <vector>

#include "heartbeat.h"
#include "loops.h"
#include "work.h"

namespace py = pybind11;

namespace sigma::noise {
namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

auto no_gil() { return py::call_guard<py::gil_scoped_release>(); }

template <class Work>
void bind_loops(py::module_& m) {
  m.def(
      "fixed_work",
      [](Work& work, FixedWork& f, int64_t duration_ns, Address stop) {
        fixed_work(work, f, duration_ns, at<uint8_t>(stop));
      },
      no_gil());
  m.def(
      "fixed_time", [](Work& work, FixedTime& f, Address stop) { fixed_time(work, f, at<uint8_t>(stop)); },
      no_gil());
}

void bind_work(py::module_& m) {
  py::class_<Spin>(m, "Spin")
      .def(py::init([](int64_t steps, uint64_t state) { return Spin{steps, state}; }))
      .def_readwrite("steps", &Spin::steps)
      .def_readonly("state", &Spin::state);
  py::class_<Copy>(m, "Copy")
      .def(py::init([](int64_t steps, Address from, Address to, int64_t slice, int64_t slices) {
        return Copy{
            .steps = steps, .from = at<char>(from), .to = at<char>(to), .slice = slice, .slices = slices};
      }))
      .def_readwrite("steps", &Copy::steps);
  py::class_<Product>(m, "Product")
      .def(py::init([](int64_t steps, int64_t E, int64_t N, int64_t K, Address offsets, Address x, Address w,
                       Address y, int threads) {
        return Product{.steps = steps,
                       .gemm = {.E = E,
                                .N = N,
                                .K = K,
                                .offsets = at<int32_t>(offsets),
                                .x = {at<float>(x), K},
                                .w = at<float>(w),
                                .w_expert = N * K,
                                .w_row = K,
                                .y = {at<float>(y), N},
                                .scale = nullptr,
                                .slot_of_row = nullptr,
                                .threads = threads}};
      }))
      .def_readwrite("steps", &Product::steps);
  bind_loops<Spin>(m);
  bind_loops<Copy>(m);
  bind_loops<Product>(m);
}

}  // namespace

void bind(py::module_& m) {
  m.def("now_ns", now_ns);
  m.def("read_clock", [](Address stamps_ns, int64_t n) { read_clock(at<int64_t>(stamps_ns), n); }, no_gil());
  py::class_<FixedWork>(m, "FixedWork")
      .def(py::init([](int64_t capacity, Address edges_ns) {
        return FixedWork{.capacity = capacity, .edges_ns = at<int64_t>(edges_ns)};
      }))
      .def_readonly("done", &FixedWork::done);
  py::class_<FixedTime>(m, "FixedTime")
      .def(py::init(
          [](int64_t begin_ns, int64_t quantum_ns, int64_t quanta, Address stamps_ns, Address counts) {
            return FixedTime{.begin_ns = begin_ns,
                             .quantum_ns = quantum_ns,
                             .quanta = quanta,
                             .stamps_ns = at<int64_t>(stamps_ns),
                             .counts = at<int64_t>(counts)};
          }))
      .def_readonly("done", &FixedTime::done)
      .def_readonly("skipped", &FixedTime::skipped);
  py::class_<Detours>(m, "Detours")
      .def(py::init([](int64_t threshold_ns, int64_t capacity, Address begin_ns, Address end_ns) {
        return Detours{.threshold_ns = threshold_ns,
                       .capacity = capacity,
                       .begin_ns = at<int64_t>(begin_ns),
                       .end_ns = at<int64_t>(end_ns)};
      }))
      .def_readonly("found", &Detours::found)
      .def_readonly("total_ns", &Detours::total_ns)
      .def_readonly("least_ns", &Detours::least_ns)
      .def_readonly("readings", &Detours::readings)
      .def_readonly("first_ns", &Detours::first_ns)
      .def_readonly("last_ns", &Detours::last_ns);
  m.def(
      "detours",
      [](Detours& d, int64_t duration_ns, Address stop) { detours(d, duration_ns, at<uint8_t>(stop)); },
      no_gil());
  bind_work(m);
  py::class_<Heartbeat>(m, "Heartbeat")
      .def(py::init<int64_t, int64_t>())
      .def_property_readonly("spent_ns", &Heartbeat::spent_ns)
      .def("take", [](Heartbeat& heartbeat) {
        std::vector<std::array<int64_t, 3>> rows;
        for (const LateWake& late : heartbeat.take())
          rows.push_back({late.due_ns, late.woke_ns, late.waited_ns});
        return rows;
      });
}

}  // namespace sigma::noise
