// Every function of csrc/cpu on odd sizes, in buffers of exactly the right size, against plain loops: what
// the sanitizers watch.  Prints 'N passed, N failed'.  Here the products and the layer; test_rows.cpp has the
// rest.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "experts.h"
#include "grouped_gemm.h"
#include "route.h"

using namespace sigma::cpu;

namespace {

template <class X, class W>
void test_gemms(const Case& c, const std::vector<int32_t>& offsets, int64_t R) {
  const int64_t N = c.I, K = c.H;
  Floats x = random_floats(R * K), b = random_floats(R * N), w = random_floats(c.E * N * K);
  const std::vector<X> stored_x = stored<X>(x), stored_b = stored<X>(b);
  const std::vector<W> stored_w = stored<W>(w);
  std::vector<double> nt(R * N), nn(R * N), outer(c.E * N * K);
  for (int64_t e = 0; e < c.E; ++e)
    for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r)
      for (int64_t n = 0; n < N; ++n)
        for (int64_t k = 0; k < K; ++k) {
          nt[r * N + n] += double(x[r * K + k]) * w[(e * N + n) * K + k];
          nn[r * N + n] += double(x[r * K + k]) * w[(e * K + k) * N + n];
          outer[(e * N + n) * K + k] += double(b[r * N + n]) * x[r * K + k];
        }
  Floats nan(c.E * N * K, NAN), rows_of_nan(R * N, NAN);
  std::vector<X> y = stored<X>(rows_of_nan), z = y;
  std::vector<W> out = stored<W>(nan);
  GroupedGemm<X, W, X> g{.E = c.E,
                         .N = N,
                         .K = K,
                         .offsets = offsets.data(),
                         .x = {stored_x.data(), K},
                         .w = stored_w.data(),
                         .w_expert = N * K,
                         .w_row = K,
                         .y = {y.data(), N},
                         .scale = nullptr,
                         .slot_of_row = nullptr,
                         .threads = 2};
  grouped_gemm_nt(g);
  g.w_row = N;
  g.y = {z.data(), N};
  grouped_gemm_nn(g);
  GroupedOuter<X, W> o{.E = c.E,
                       .A = N,
                       .B = K,
                       .offsets = offsets.data(),
                       .a = {stored_b.data(), N},
                       .b = {stored_x.data(), K},
                       .out = out.data(),
                       .out_expert = N * K,
                       .out_row = K,
                       .adds = false,
                       .threads = 2};
  grouped_outer(o);
  check("grouped_gemm_nt", y, nt);
  check("grouped_gemm_nn", z, nn);
  check("grouped_outer", out, outer);
  o.adds = true;
  grouped_outer(o);
  for (double& v : outer) v *= 2;
  check("grouped_outer, adding", out, outer);
}

void test_int8(const Case& c, const std::vector<int32_t>& offsets, int64_t R) {
  const int64_t N = c.I, K = c.H;
  const Floats x = random_floats(R * K), scale = random_floats(c.E * N);
  std::vector<Int8> w(c.E * N * K);
  for (Int8& v : w) v.value = static_cast<int8_t>(static_cast<int>(generator() % 255) - 127);
  std::vector<double> want(R * N);
  for (int64_t e = 0; e < c.E; ++e)
    for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r)
      for (int64_t n = 0; n < N; ++n) {
        for (int64_t k = 0; k < K; ++k)
          want[r * N + n] += double(x[r * K + k]) * w[(e * N + n) * K + k].value;
        want[r * N + n] *= scale[e * N + n];
      }
  Floats y(R * N, NAN);
  grouped_gemm_nt(GroupedGemm<float, Int8, float>{.E = c.E,
                                                  .N = N,
                                                  .K = K,
                                                  .offsets = offsets.data(),
                                                  .x = {x.data(), K},
                                                  .w = w.data(),
                                                  .w_expert = N * K,
                                                  .w_row = K,
                                                  .y = {y.data(), N},
                                                  .scale = nullptr,
                                                  .slot_of_row = nullptr,
                                                  .threads = 2,
                                                  .column_scale = scale.data()});
  check("grouped_gemm_nt, int8", y, want, 1e-6);
}

template <class X, class W>
void test_experts(const Case& c, const std::vector<int32_t>& indices, const std::vector<int32_t>& offsets,
                  const std::vector<int32_t>& row_map) {
  const int64_t T = c.T, H = c.H, I = c.I, E = c.E, k = c.k, R = T * k;
  const double noise =
      std::is_same_v<X, Bf16> ? 1.0 / 128 : 0;  // of the activation, rounded between two GEMMs
  Floats w = random_floats(T * k);
  const std::vector<W> stored_w = stored<W>(w);
  Floats x = random_floats(T * H), grad = random_floats(T * H), w1 = random_floats(E * 2 * I * H),
         w2 = random_floats(E * H * I);
  const std::vector<X> stored_x = stored<X>(x), stored_grad = stored<X>(grad);
  const std::vector<W> stored_w1 = stored<W>(w1), stored_w2 = stored<W>(w2);
  const auto unwritten = []<class S>(int64_t n, S) {
    Floats nan(n, NAN);
    return stored<S>(nan);
  };
  Floats gate_up(R * 2 * I, NAN), by_slot(R * H, NAN);
  std::vector<X> hidden = unwritten(R * I, X{}), out = unwritten(T * H, X{});
  const Experts<X, W> m{.T = T,
                        .H = H,
                        .I = I,
                        .E = E,
                        .k = c.k,
                        .x = stored_x.data(),
                        .ldx = H,
                        .offsets = offsets.data(),
                        .row_map = row_map.data(),
                        .weights = w.data(),
                        .gate_up_proj = stored_w1.data(),
                        .gate_up_expert = 2 * I * H,
                        .gate_up_row = H,
                        .down_proj = stored_w2.data(),
                        .down_expert = H * I,
                        .down_row = I,
                        .gate_up = gate_up.data(),
                        .threads = 2};
  experts_forward(m,
                  ExpertsForward<X>{.hidden = hidden.data(), .by_slot = by_slot.data(), .out = out.data()});

  std::vector<double> want(T * H), dx(T * H), dw(R), dw1(w1.size()), dw2(w2.size());
  for (int64_t e = 0; e < E; ++e)
    for (int64_t r = offsets[e]; r < offsets[e + 1]; ++r) {
      const int64_t s = row_map[r], t = s / k;
      const double weight = w[s];
      for (int64_t i = 0; i < I; ++i) {
        double a = 0, u = 0, dh = 0;
        for (int64_t h = 0; h < H; ++h) {
          a += double(x[t * H + h]) * w1[(e * 2 * I + i) * H + h];
          u += double(x[t * H + h]) * w1[(e * 2 * I + I + i) * H + h];
          dh += double(grad[t * H + h]) * w2[(e * H + h) * I + i];
        }
        const double sig = 1 / (1 + std::exp(-a)), act = a * sig * u;
        const double da = weight * dh * u * (sig + a * sig * (1 - sig)), du = weight * dh * a * sig;
        dw[s] += dh * act;
        for (int64_t h = 0; h < H; ++h) {
          want[t * H + h] += weight * act * w2[(e * H + h) * I + i];
          dx[t * H + h] += da * w1[(e * 2 * I + i) * H + h] + du * w1[(e * 2 * I + I + i) * H + h];
          dw1[(e * 2 * I + i) * H + h] += da * x[t * H + h];
          dw1[(e * 2 * I + I + i) * H + h] += du * x[t * H + h];
          dw2[(e * H + h) * I + i] += weight * act * grad[t * H + h];
        }
      }
    }
  check("experts_forward", out, want, noise);
  std::vector<X> again = unwritten(T * H, X{});
  std::vector<int64_t> wide_indices(indices.begin(), indices.end());
  const auto infer = [&] { return experts_inference(m, wide_indices.data(), stored_w.data(), again.data()); };
  expect("experts_inference", infer() == -1 && std::memcmp(again.data(), out.data(), T * H * sizeof(X)) == 0);
  wide_indices[R - 1] = int64_t{1} << 32;
  expect("the wrong index", infer() == R - 1);
  Floats grad_w(R, NAN);
  std::vector<X> grad_gate_up = unwritten(R * 2 * I, X{}), grad_x = unwritten(T * H, X{});
  std::vector<W> grad_w1 = unwritten(w1.size(), W{}), grad_w2 = unwritten(w2.size(), W{});
  experts_backward(m, ExpertsBackward<X, W>{.grad_out = stored_grad.data(),
                                            .ld_grad = H,
                                            .grad_gate_up = grad_gate_up.data(),
                                            .hidden = hidden.data(),
                                            .by_slot = by_slot.data(),
                                            .grad_weights = grad_w.data(),
                                            .grad_x = grad_x.data(),
                                            .grad_gate_up_proj = grad_w1.data(),
                                            .grad_down_proj = grad_w2.data(),
                                            .adds = false});
  check("grad_x", grad_x, dx, noise);
  check("grad_weights", grad_w, dw, noise);
  check("grad_gate_up_proj", grad_w1, dw1, noise);
  check("grad_down_proj", grad_w2, dw2, noise);
  if constexpr (!std::is_same_v<W, float>) {
    Floats wide_w1(w1.size(), NAN), wide_w2(w2.size(), NAN);
    experts_backward(m, ExpertsBackward<X, W, float>{.grad_out = stored_grad.data(),
                                                     .ld_grad = H,
                                                     .grad_gate_up = grad_gate_up.data(),
                                                     .hidden = hidden.data(),
                                                     .by_slot = by_slot.data(),
                                                     .grad_weights = grad_w.data(),
                                                     .grad_x = nullptr,
                                                     .grad_gate_up_proj = wide_w1.data(),
                                                     .grad_down_proj = wide_w2.data(),
                                                     .adds = false});
    check("grad_gate_up_proj in f32", wide_w1, dw1, noise);
    check("grad_down_proj in f32", wide_w2, dw2, noise);
  }
}

}  // namespace

int main() {
  for (const Case c : {Case{1, 1, 1, 1, 1},
                       {3, 5, 7, 2, 1},
                       {33, 67, 35, 5, 2},
                       {70, 130, 65, 4, 1},
                       {300, 33, 18, 3, 3},
                       {60, 1024, 9, 5, 1},  // rows whole pages apart: in f32, and in bf16 too
                       {60, 2048, 9, 5, 1},
                       {700, 64, 32, 2, 1}}) {
    const std::vector<int32_t> indices = random_indices(c);
    const int64_t R = c.T * c.k;
    std::vector<int32_t> counts(c.E), offsets(c.E + 1), row_map(R);
    const int64_t wrong =
        group_by_expert(indices.data(), R, c.E, counts.data(), offsets.data(), row_map.data(), 2);
    wrong == -1 && rises(offsets.data(), c.E, R) && wrong_row(row_map.data(), R, R) == -1 ? ++passed
                                                                                          : ++failed;
    test_gemms<float, float>(c, offsets, R);
    test_gemms<float, Bf16>(c, offsets, R);
    test_gemms<float, F16>(c, offsets, R);
    test_gemms<Bf16, Bf16>(c, offsets, R);
    test_int8(c, offsets, R);
    test_experts<float, float>(c, indices, offsets, row_map);
    test_experts<float, Bf16>(c, indices, offsets, row_map);
    test_experts<float, F16>(c, indices, offsets, row_map);
    test_experts<Bf16, Bf16>(c, indices, offsets, row_map);
    test_rows(c, row_map);
  }
  test_numbers_and_maps();
  std::printf("%s: %d passed, %d failed\n", kernels().name, passed, failed);
  return failed != 0;
}
