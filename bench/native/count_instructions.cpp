// Counts every instruction of the micro-kernels by stepping through them, on the processor itself: the same
// figures on a noisy machine, and for instruction sets that no simulator at hand knows.
//
// A line is a call, the instructions it took, the vector multiply-adds that its FLOPs need at this
// instruction set's width, and the instructions for each of these.  `least` is what a loop of nothing but
// multiply-adds and the loads of their operands takes: (MR * NR + MR + NR) / (MR * NR) for a block of MR x
// NR.
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "dispatch.h"
#include "experts.h"
#include "grouped_gemm.h"

using namespace sigma;
using namespace sigma::cpu;

namespace {

// Of `run`, in a child that this process steps through; less those of the signals around it.
long instructions_between_signals(const std::function<void()>& run) {
  const pid_t child = fork();
  if (child == 0) {
    run();  // once before: nothing is resolved or faulted in while it counts
    if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(1);
    raise(SIGUSR1);
    run();
    raise(SIGUSR1);
    _exit(0);
  }
  int status = 0;
  const auto stops_by = [&](int signal) {
    waitpid(child, &status, 0);
    return WIFSTOPPED(status) && WSTOPSIG(status) == signal;
  };
  if (child < 0 || !stops_by(SIGUSR1)) {
    std::fprintf(stderr, "error: this process may not trace its child\n");
    std::exit(1);
  }
  long count = 0;
  do {
    ptrace(PTRACE_SINGLESTEP, child, nullptr, nullptr);
    ++count;
  } while (stops_by(SIGTRAP));
  ptrace(PTRACE_CONT, child, nullptr, nullptr);
  waitpid(child, &status, 0);
  return count;
}

long instructions_of(const std::function<void()>& run) {
  static const long empty = instructions_between_signals([] {});
  return instructions_between_signals(run) - empty;
}

void line(const std::string& name, double multiply_adds, double least, const std::function<void()>& run) {
  const long count = instructions_of(run);
  std::printf("| %s | %ld | %.0f | %.2f | %.2f |\n", name.c_str(), count, multiply_adds,
              count / multiply_adds, least);
}

double least_of_block(double rows, double columns) {
  return (rows * columns + rows + columns) / (rows * columns);
}

constexpr int64_t kRows = 21, kColumns = 64, kDepth = 256;  // rows of shape A; a step takes microseconds

// A block of dot, and what a forward task makes of it for 21 rows; then the same of panels for both
// gradients.
template <class X, class W>
void count_gemms(const std::string& types) {
  const Kernels& isa = kernels();
  const double lanes = isa.lanes * kStep<X>;
  std::vector<X> x(kRows * kDepth);
  std::vector<W> w(kDepth * kDepth);
  std::vector<float> y(kRows * kDepth);
  std::vector<Packed<X>> packed(kDepth * isa.panel);
  const int64_t rows = isa.panel_rows, panel_vectors = isa.panel / isa.lanes;
  const X* a[kRows];
  float* c[kRows];
  for (int64_t i = 0; i < kRows; ++i) a[i] = x.data() + i * kDepth, c[i] = y.data() + i * kDepth;
  const int32_t offsets[] = {0, kRows};
  const GroupedGemm<X, W, float> task{.E = 1,
                                      .N = kDepth,
                                      .K = kDepth,
                                      .offsets = offsets,
                                      .x = {x.data(), kDepth},
                                      .w = w.data(),
                                      .w_expert = kDepth * kDepth,
                                      .w_row = kDepth,
                                      .y = {y.data(), kDepth},
                                      .scale = nullptr,
                                      .slot_of_row = nullptr,
                                      .threads = 1};
  const int64_t tall = isa.dot_rows, wide = isa.dot_cols[tall];
  line("dot " + types + ", " + std::to_string(tall) + " x " + std::to_string(wide),
       tall * wide * kDepth / lanes, least_of_block(tall, wide), [&] {
         static_cast<const DotKernels<X, W>&>(isa).dot[tall][wide]({.a = a,
                                                                    .b = w.data(),
                                                                    .ldb = kDepth,
                                                                    .c = c,
                                                                    .column = 0,
                                                                    .scale = nullptr,
                                                                    .K = kDepth,
                                                                    .mode = Store::kWrite});
       });
  line("forward " + types + ", 21 rows", kRows * kColumns * kDepth / lanes, least_of_block(tall, wide),
       [&] { gemm_nt_columns(isa, task, 0, 0, kRows, 0, kColumns, static_cast<const W*>(nullptr)); });
  if constexpr (!std::is_same_v<W, Int8>) {
    line("input gradient " + types + ", 21 rows", kRows * kColumns * kDepth / lanes,
         least_of_block(rows, panel_vectors), [&] {
           gemm_nn_columns(isa, task, 0, 0, kRows, 0, kColumns,
                           Rows<float>{.base = y.data(), .ld = kColumns});
         });
    const int64_t steps = ceil_div(kRows, kStep<X>);
    W* out[kMaxBlockRows];
    for (int64_t m = 0; m < rows; ++m) out[m] = w.data() + m * kDepth;
    line("weight gradient " + types + ", 21 rows", rows * panel_vectors * steps,
         least_of_block(rows, panel_vectors), [&] {
           static_cast<const PanelKernels<X, W>&>(isa).panel_product[rows]({.a = packed.data(),
                                                                            .b = packed.data(),
                                                                            .c = out,
                                                                            .column = 0,
                                                                            .steps = steps,
                                                                            .columns = isa.panel,
                                                                            .mode = Store::kWrite});
         });
  }
}

}  // namespace

int main() {
  std::printf("## %s, %d lanes\n\n", kernels().name, kernels().lanes);
  std::printf("| call | instructions | multiply-adds | a multiply-add | least |\n|---|---|---|---|---|\n");
  count_gemms<float, float>("f32");
  count_gemms<float, Bf16>("f32 by bf16");
  count_gemms<Bf16, Bf16>("bf16 by bf16");
  count_gemms<float, F16>("f32 by f16");
  count_gemms<float, Int8>("f32 by int8");
  std::printf("\n");
}
