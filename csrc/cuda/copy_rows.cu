// A warp a row, 16 bytes a lane where the addresses allow it.  Bound: bytes.
#include "copy_row.cuh"
#include "rows.h"

namespace sigma::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int64_t kMaxBlocks = 1 << 20;

template <class Unit>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(CopyRows c) {
  for (int64_t r = blockIdx.x * int64_t{kWarps} + warp(); r < c.R; r += gridDim.x * int64_t{kWarps}) {
    // 32-bit division: one of 64 bits is a call, for which registers spill.
    const int64_t from = c.x_index ? c.x_index[r] / c.x_divisor : r, to = c.out_index ? c.out_index[r] : r;
    if ((c.x_index && c.x_index[r] < 0) || to < 0) continue;
    const char* const x = c.x + from * c.ldx;
    char* const out = c.out + to * c.ld_out;
    copy_row<Unit>(x, out, c.row_bytes);
  }
}

__global__ void __launch_bounds__(kThreads)
    invert_kernel(const int32_t* row_map, int64_t R, int32_t* row_of_slot) {
  for (int64_t r = blockIdx.x * int64_t{kThreads} + threadIdx.x; r < R; r += gridDim.x * int64_t{kThreads})
    row_of_slot[row_map[r]] = static_cast<int32_t>(r);
}

}  // namespace

cudaError_t copy_rows(const CopyRows& c, cudaStream_t stream) {
  if (c.R == 0 || c.row_bytes == 0) return cudaSuccess;
  const dim3 grid(smaller(ceil_div(c.R, kWarps), kMaxBlocks));
  with_unit(c.x, c.ldx, c.out, c.ld_out,
            [&]<class Unit>() { SK_LAUNCH(copy_rows_kernel<Unit>, grid, kThreads, 0, stream, c); });
  return cudaGetLastError();
}

cudaError_t invert(const int32_t* row_map, int64_t R, int32_t* row_of_slot, cudaStream_t stream) {
  if (R == 0) return cudaSuccess;
  SK_LAUNCH(invert_kernel, smaller(ceil_div(R, kThreads), kMaxBlocks), kThreads, 0, stream, row_map, R,
            row_of_slot);
  return cudaGetLastError();
}

}  // namespace sigma::cuda
