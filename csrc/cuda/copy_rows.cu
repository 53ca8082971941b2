// A warp a row, 16 bytes a lane where the addresses allow it.  Bound: bytes.
#include "launch.cuh"
#include "number.cuh"
#include "rows.h"

namespace sigma::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int64_t kMaxBlocks = 1 << 20;

template <class Unit>
__global__ void __launch_bounds__(kThreads) copy_rows_kernel(CopyRows c) {
  const int64_t units = c.row_bytes / static_cast<int64_t>(sizeof(Unit));
  for (int64_t r = blockIdx.x * int64_t{kWarps} + warp(); r < c.R; r += gridDim.x * int64_t{kWarps}) {
    // 32-bit division: one of 64 bits is a call, for which registers spill.
    const int64_t from = c.x_index ? c.x_index[r] / c.x_divisor : r, to = c.out_index ? c.out_index[r] : r;
    if ((c.x_index && c.x_index[r] < 0) || to < 0) continue;
    const char* const x = c.x + from * c.ldx;
    char* const out = c.out + to * c.ld_out;
    int64_t i = lane();
    for (; i + 3 * kWarp < units; i += 4 * kWarp) {  // four loads under way a lane
      Unit part[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) part[j] = reinterpret_cast<const Unit*>(x)[i + j * kWarp];
#pragma unroll
      for (int j = 0; j < 4; ++j) reinterpret_cast<Unit*>(out)[i + j * kWarp] = part[j];
    }
    for (; i < units; i += kWarp) reinterpret_cast<Unit*>(out)[i] = reinterpret_cast<const Unit*>(x)[i];
    const int64_t b = units * static_cast<int64_t>(sizeof(Unit)) + lane();
    if (b < c.row_bytes) out[b] = x[b];
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
  const auto fits = [&](int64_t bytes) {
    return is_aligned(c.x, bytes) && is_aligned(c.out, bytes) && c.ldx % bytes == 0 && c.ld_out % bytes == 0;
  };
  if (fits(16))
    SK_LAUNCH(copy_rows_kernel<uint4>, grid, kThreads, 0, stream, c);
  else if (fits(4))
    SK_LAUNCH(copy_rows_kernel<uint32_t>, grid, kThreads, 0, stream, c);
  else if (fits(2))
    SK_LAUNCH(copy_rows_kernel<uint16_t>, grid, kThreads, 0, stream, c);
  else
    SK_LAUNCH(copy_rows_kernel<uint8_t>, grid, kThreads, 0, stream, c);
  return cudaGetLastError();
}

cudaError_t invert(const int32_t* row_map, int64_t R, int32_t* row_of_slot, cudaStream_t stream) {
  if (R == 0) return cudaSuccess;
  SK_LAUNCH(invert_kernel, smaller(ceil_div(R, kThreads), kMaxBlocks), kThreads, 0, stream, row_map, R,
            row_of_slot);
  return cudaGetLastError();
}

}  // namespace sigma::cuda
