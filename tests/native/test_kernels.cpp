// Every function of csrc/cpu on odd sizes, in buffers of exactly the right size, against plain loops: what
// the sanitizers watch.  Prints 'N passed, N failed'.
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "convert.h"
#include "dispatch.h"
#include "experts.h"
#include "grouped_gemm.h"
#include "memory.h"
#include "permute.h"
#include "route.h"

using namespace sigma::cpu;
using sigma::Bf16;
using sigma::F16;
using sigma::Int8;
using Floats = std::vector<float>;

namespace {

int passed = 0, failed = 0;
std::mt19937 generator(1);

Floats random_floats(int64_t n) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  Floats out(n);
  for (float& x : out) x = uniform(generator);
  return out;
}

float to_float(float x) { return x; }
float to_float(Bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

#if defined(__aarch64__)
using Half = __fp16;  // GCC 12 has no _Float16 in C++ there
#else
using Half = _Float16;
#endif
float to_float(F16 x) { return static_cast<float>(std::bit_cast<Half>(x.bits)); }

void expect(const char* what, bool is_true) {
  is_true ? ++passed : ++failed;
  if (!is_true) std::printf("wrong: %s\n", what);
}

// Rounds x itself, so that what is checked against sees the same numbers.
template <class W>
std::vector<W> stored(Floats& x) {
  std::vector<W> out(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    if constexpr (std::is_same_v<W, Bf16>) {
      const uint32_t bits = std::bit_cast<uint32_t>(x[i]), low = bits & 0xFFFF;
      const bool goes_up = low > 0x8000 || (low == 0x8000 && (bits >> 16 & 1));
      out[i] = Bf16{static_cast<uint16_t>((bits >> 16) + goes_up)};
    } else if constexpr (std::is_same_v<W, F16>) {
      out[i] = F16{std::bit_cast<uint16_t>(static_cast<Half>(x[i]))};
    } else {
      out[i] = x[i];
    }
    x[i] = to_float(out[i]);
  }
  return out;
}

// `noise`: what operands that were rounded on the way add to a result's error, beside its own rounding.
template <class W>
void check(const char* what, const std::vector<W>& got, const std::vector<double>& want, double noise = 0) {
  // Half a unit of 8 or 11 bits of mantissa.
  const double rounding = std::is_same_v<W, Bf16> ? 1.0 / 256 : std::is_same_v<W, F16> ? 1.0 / 2048 : 0;
  double size = 0;
  for (const double w : want) size = std::max(size, std::abs(w));
  bool is_close = got.size() == want.size();
  for (size_t i = 0; is_close && i < want.size(); ++i)
    is_close =
        std::abs(to_float(got[i]) - want[i]) <= 1e-4 + noise * size + (1e-4 + rounding) * std::abs(want[i]);
  is_close ? ++passed : ++failed;
  if (!is_close) std::printf("wrong: %s\n", what);
}

struct Case {
  int64_t T, H, I, E;
  int k;
};

// Sizes of experts that leave the first idle and crowd the last.
std::vector<int32_t> random_indices(const Case& c) {
  std::vector<int32_t> indices(c.T * c.k);
  for (int64_t s = 0; s < c.T * c.k; ++s)
    indices[s] = static_cast<int32_t>(c.E == 1 ? 0 : s % 3 == 0 ? c.E - 1 : 1 + generator() % (c.E - 1));
  return indices;
}

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
}

template <class X>
void test_permute(const Case& c, const std::vector<int32_t>& row_map) {
  const int64_t T = c.T, H = c.H, k = c.k, R = T * k;
  const Floats w = random_floats(R);
  Floats x = random_floats(T * H), grad = random_floats(T * H), nan_rows(R * H, NAN), nan_tokens(T * H, NAN);
  const std::vector<X> stored_x = stored<X>(x), stored_grad = stored<X>(grad);
  std::vector<X> rows = stored<X>(nan_rows), out = stored<X>(nan_tokens), grad_y = rows;
  Floats grad_w(R, NAN);
  std::vector<int32_t> inverse(R);
  constexpr int64_t kBytes = sizeof(X);
  permute({.R = R,
           .row_bytes = H * kBytes,
           .k = c.k,
           .x = reinterpret_cast<const char*>(stored_x.data()),
           .ldx_bytes = H * kBytes,
           .row_map = row_map.data(),
           .out = reinterpret_cast<char*>(rows.data()),
           .threads = 2});
  invert(row_map.data(), R, inverse.data());
  combine(Combine<X>{.T = T,
                     .H = H,
                     .k = c.k,
                     .y = rows.data(),
                     .ldy = H,
                     .row_of_slot = inverse.data(),
                     .weights = w.data(),
                     .out = out.data(),
                     .threads = 2});
  combine_backward(CombineBackward<X>{.R = R,
                                      .H = H,
                                      .k = c.k,
                                      .grad_out = stored_grad.data(),
                                      .y = rows.data(),
                                      .ld_grad = H,
                                      .ldy = H,
                                      .row_map = row_map.data(),
                                      .weights = w.data(),
                                      .grad_y = grad_y.data(),
                                      .grad_weights = grad_w.data(),
                                      .threads = 2});
  std::vector<double> want(T * H), want_w(R);
  for (int64_t s = 0; s < R; ++s)
    for (int64_t h = 0; h < H; ++h) {
      want[s / k * H + h] += double(w[s]) * x[s / k * H + h];
      want_w[s] += double(grad[s / k * H + h]) * x[s / k * H + h];
    }
  std::vector<double> want_y(R * H);
  for (int64_t r = 0; r < R; ++r)
    for (int64_t h = 0; h < H; ++h) want_y[r * H + h] = double(w[row_map[r]]) * grad[row_map[r] / k * H + h];
  check("combine_backward, rows", grad_y, want_y);
  check("permute and combine", out, want);
  check("combine_backward", grad_w, want_w);
}

void test_route(const Case& c) {
  const int64_t T = c.T, E = c.E;
  for (const int k : {1, static_cast<int>(E)})
    for (int mode = 0; mode < 32; ++mode) {
      const bool is_softmax = mode & 1, is_normalized = mode & 2, has_bias = mode & 4;
      const bool has_sums = mode & 8, sums_softmax = mode & 16;
      if (sums_softmax && !has_sums) continue;
      const Floats logits = random_floats(T * E), bias = random_floats(E), grad_w = random_floats(T * k);
      const Floats grad_sums = random_floats(E), grad_square = random_floats(1);
      std::vector<int32_t> indices(T * k), counts(E), offsets(E + 1), row_map(T * k);
      Floats weights(T * k, NAN), grad(T * E, NAN), sums(E, NAN), square(1, NAN);
      route({.T = T,
             .E = E,
             .k = k,
             .logits = logits.data(),
             .ld = E,
             .bias = has_bias ? bias.data() : nullptr,
             .is_softmax = is_softmax,
             .is_normalized = is_normalized,
             .indices = indices.data(),
             .weights = weights.data(),
             .counts = counts.data(),
             .offsets = offsets.data(),
             .row_map = row_map.data(),
             .threads = 2,
             .sums_softmax = sums_softmax,
             .probabilities = has_sums ? sums.data() : nullptr,
             .square = has_sums ? square.data() : nullptr});
      route_backward({.T = T,
                      .E = E,
                      .k = k,
                      .logits = logits.data(),
                      .ld = E,
                      .is_softmax = is_softmax,
                      .is_normalized = is_normalized,
                      .indices = indices.data(),
                      .grad_weights = grad_w.data(),
                      .grad_logits = grad.data(),
                      .threads = 2,
                      .sums_softmax = sums_softmax,
                      .grad_probabilities = has_sums ? grad_sums.data() : nullptr,
                      .grad_square = has_sums ? grad_square.data() : nullptr});
      std::vector<double> want(T * k), want_grad(T * E), want_sums(E), want_square(1);
      for (int64_t t = 0; t < T; ++t) {
        const auto exp_of = [&](int64_t e) { return std::exp(double{logits[t * E + e]}); };
        const auto sigmoid_of = [&](int64_t e) { return 1 / (1 + 1 / exp_of(e)); };
        const auto score = [&](int64_t e) { return is_softmax ? exp_of(e) : sigmoid_of(e); };
        const auto share = [&](int64_t e) { return sums_softmax ? exp_of(e) : sigmoid_of(e); };
        double all = 0, chosen = 0, exps = 0, shares = 0, inner = 0, inner_sums = 0;
        for (int64_t e = 0; e < E; ++e) all += score(e), exps += exp_of(e), shares += share(e);
        for (int j = 0; j < k; ++j) chosen += score(indices[t * k + j]);
        for (int64_t e = 0; e < E; ++e) inner_sums += grad_sums[e] * share(e) / shares;
        for (int j = 0; j < k; ++j) {
          want[t * k + j] = score(indices[t * k + j]) / (is_normalized ? chosen : is_softmax ? all : 1);
          inner += grad_w[t * k + j] * want[t * k + j];
        }
        double* const g = &want_grad[t * E];
        if (!is_softmax && !is_normalized) inner = 0;
        for (int64_t e = 0; is_softmax && !is_normalized && e < E; ++e) g[e] -= score(e) / all * inner;
        for (int j = 0; j < k; ++j) {
          const int64_t e = indices[t * k + j];
          const double slope = is_softmax ? 1 : 1 - sigmoid_of(e);
          g[e] += want[t * k + j] * slope * (grad_w[t * k + j] - (is_normalized ? inner : 0));
        }
        for (int64_t e = 0; has_sums && e < E; ++e) {
          const double slope = sums_softmax ? 1 : 1 - sigmoid_of(e);
          g[e] += share(e) / shares * (grad_sums[e] - inner_sums) * slope;
          g[e] += 2 * grad_square[0] * std::log(exps) * exp_of(e) / exps;
          want_sums[e] += share(e) / shares;
        }
        want_square[0] += std::log(exps) * std::log(exps);
      }
      check("route", weights, want);
      check("route_backward", grad, want_grad);
      if (!has_sums) continue;
      check("sums of route", sums, want_sums);
      check("squares of route", square, want_square);
    }
}

void test_blocks() {
  constexpr int64_t MiB = int64_t{1} << 20;
  auto take = [](int64_t bytes) {
    char* const p = static_cast<char*>(take_block(bytes));
    p[0] = p[bytes - 1] = 1;
    return p;
  };
  char* const a = take(5 * MiB);
  expect("a block is aligned to huge pages", reinterpret_cast<uintptr_t>(a) % (2 * MiB) == 0);
  give_block(a, 5 * MiB);
  expect("a free block is kept, rounded up", free_block_bytes() == 6 * MiB);
  expect("the next of its size gets it", take(6 * MiB - 1) == a);
  give_block(a, 6 * MiB - 1);
  char* const b = take(4 * MiB);
  expect("another size pushes it out, or 10 of at most 6 MiB would be held", free_block_bytes() == 0);
  char* const c = take(4 * MiB);
  give_block(b, 4 * MiB);
  give_block(c, 4 * MiB);
  expect("as much stays as was taken at once", free_block_bytes() == 8 * MiB);
  release_free_blocks();
  expect("all can be released", free_block_bytes() == 0);
  expect("no memory is an answer, not a crash", take_block(int64_t{1} << 60) == nullptr);

  std::vector<std::thread> threads;
  std::atomic<bool> is_exclusive = true;
  for (char id = 0; id < 4; ++id)
    threads.emplace_back([&, id] {
      for (int i = 0; i < 200; ++i) {
        char* const p = static_cast<char*>(take_block(2 * MiB));
        p[0] = p[MiB] = id;
        if (i % 8 == 0) std::this_thread::yield();
        if (p[0] != id || p[MiB] != id) is_exclusive = false;
        give_block(p, 2 * MiB);
      }
    });
  for (std::thread& t : threads) t.join();
  expect("a block has one owner", is_exclusive);
  release_free_blocks();
}

}  // namespace

// Every number of 16 bits survives the way through f32, and every f32 goes to the nearest, ties to even.
template <class T>
void test_convert() {
  std::vector<T> all(1 << 16), back(1 << 16);
  Floats wide(1 << 16);
  for (int i = 0; i < 1 << 16; ++i) all[i].bits = static_cast<uint16_t>(i);
  widen(Convert<T>{.rows = 1,
                   .columns = 1 << 16,
                   .wide = wide.data(),
                   .narrow = all.data(),
                   .ld_narrow = 0,
                   .threads = 1});
  narrow(Convert<T>{.rows = 1,
                    .columns = 1 << 16,
                    .wide = wide.data(),
                    .narrow = back.data(),
                    .ld_narrow = 0,
                    .threads = 1});
  bool is_same = true;
  for (int i = 0; i < 1 << 16; ++i) {
    const float want = to_float(all[i]);
    is_same &= std::isnan(want) ? std::isnan(wide[i]) && std::isnan(to_float(back[i]))
                                : wide[i] == want && back[i].bits == all[i].bits;
  }
  expect("16 bits to f32 and back", is_same);

  Floats x = random_floats(1003);
  for (int i = 0; i < 64; ++i)
    x[i] = std::bit_cast<float>(0x3F808000u + (static_cast<uint32_t>(i) << 15));  // ties
  for (int i = 64; i < 128; ++i) x[i] *= std::ldexp(1.0f, 40 - i);  // small, denormal halves among them
  const Floats unrounded = x;
  const std::vector<T> want = stored<T>(x);
  std::vector<T> got(1003);
  narrow(Convert<T>{.rows = 17,
                    .columns = 59,
                    .wide = const_cast<float*>(unrounded.data()),
                    .narrow = got.data(),
                    .ld_narrow = 59,
                    .threads = 2});
  is_same = true;
  for (size_t i = 0; i < got.size(); ++i) is_same &= got[i].bits == want[i].bits;
  expect("f32 to the nearest of 16 bits, ties to even", is_same);
}

// With the argument 'blocks', the tests of memory alone: what ThreadSanitizer can watch.
int main(int count, char**) {
  test_blocks();
  if (count > 1) {
    std::printf("blocks: %d passed, %d failed\n", passed, failed);
    return failed != 0;
  }
  for (const Case c : {Case{1, 1, 1, 1, 1},
                       {3, 5, 7, 2, 1},
                       {33, 67, 35, 5, 2},
                       {70, 130, 65, 4, 1},
                       {300, 33, 18, 3, 3},
                       {700, 64, 32, 2, 1}}) {
    const std::vector<int32_t> indices = random_indices(c);
    const int64_t R = c.T * c.k;
    std::vector<int32_t> counts(c.E), offsets(c.E + 1), row_map(R);
    const int64_t wrong =
        group_by_expert(indices.data(), R, c.E, counts.data(), offsets.data(), row_map.data(), 2);
    wrong == -1 && rises(offsets.data(), c.E, R) && wrong_row(row_map.data(), R) == -1 ? ++passed : ++failed;
    test_gemms<float, float>(c, offsets, R);
    test_gemms<float, Bf16>(c, offsets, R);
    test_gemms<float, F16>(c, offsets, R);
    test_gemms<Bf16, Bf16>(c, offsets, R);
    test_int8(c, offsets, R);
    test_experts<float, float>(c, indices, offsets, row_map);
    test_experts<float, Bf16>(c, indices, offsets, row_map);
    test_experts<float, F16>(c, indices, offsets, row_map);
    test_experts<Bf16, Bf16>(c, indices, offsets, row_map);
    test_permute<float>(c, row_map);
    test_permute<Bf16>(c, row_map);
    test_permute<F16>(c, row_map);
    test_route(c);
  }
  test_convert<Bf16>();
  test_convert<F16>();
  const int32_t bad[] = {0, 1, 5};
  int32_t counts[3], offsets[4], row_map[3];
  group_by_expert(bad, 3, 3, counts, offsets, row_map, 1) == 2 ? ++passed : ++failed;
  const int32_t twice[] = {1, 0, 1}, below[] = {0, -1, 2}, falls[] = {0, 2, 1, 3};
  wrong_row(bad, 3) == 2 && wrong_row(twice, 3) == 2 && wrong_row(below, 3) == 1 ? ++passed : ++failed;
  !rises(falls, 3, 3) && !rises(bad, 2, 4) && rises(bad, 2, 5) ? ++passed : ++failed;
  std::printf("%s: %d passed, %d failed\n", kernels().name, passed, failed);
  return failed != 0;
}
