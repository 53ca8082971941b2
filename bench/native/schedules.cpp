// The products of one version, for bench/native/race.cpp to load beside another's.
#include "schedules.h"

#include "grouped_gemm.h"

using namespace sigma::cpu;

extern "C" __attribute__((visibility("default"))) void run(const Product& p) {
  const int64_t w_row = p.is_transposed ? p.N : p.K;
  if (p.is_outer)
    grouped_outer(GroupedOuter<>{.E = p.E,
                                 .A = p.N,
                                 .B = p.K,
                                 .offsets = p.offsets,
                                 .a = {p.y, p.N},
                                 .b = {p.x, p.K},
                                 .out = p.w,
                                 .out_expert = p.N * p.K,
                                 .out_row = p.K,
                                 .adds = p.adds,
                                 .threads = p.threads});
  else
    (p.is_transposed ? grouped_gemm_nn<float, float, float>
                     : grouped_gemm_nt<float, float, float>)({.E = p.E,
                                                              .N = p.N,
                                                              .K = p.K,
                                                              .offsets = p.offsets,
                                                              .x = {p.x, p.K},
                                                              .w = p.w,
                                                              .w_expert = p.N * p.K,
                                                              .w_row = w_row,
                                                              .y = {p.y, p.N},
                                                              .scale = nullptr,
                                                              .slot_of_row = nullptr,
                                                              .threads = p.threads});
}
