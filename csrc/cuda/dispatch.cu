// Packing is one pass over the rows: a warp finds its row's segment and copies it.  Bound: bytes.
#include "copy_row.cuh"
#include "dispatch.h"

namespace sigma::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int64_t kMaxBlocks = 1 << 20;

// The last rank whose first row is not beyond r.
__device__ int rank_of_row(const Pack& p, int experts, int32_t r) {
  int low = 0, high = p.ranks;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (p.offsets[middle * experts] <= r ? low : high) = middle;
  }
  return low;
}

template <class Unit>
__global__ void __launch_bounds__(kThreads) pack_kernel(Pack p, int experts) {
  if (blockIdx.x == 0)
    for (int rank = threadIdx.x; rank < p.ranks; rank += kThreads) {
      const int32_t rows = p.offsets[(rank + 1) * experts] - p.offsets[rank * experts];
      const auto sent = static_cast<int32_t>(p.capacity ? smaller(rows, p.capacity) : rows);
      p.rank_counts[rank] = sent;
      if (sent < rows) atomicAdd(p.dropped, rows - sent);
    }
  for (int64_t r = blockIdx.x * int64_t{kWarps} + warp(); r < p.R; r += gridDim.x * int64_t{kWarps}) {
    int64_t place = r;
    if (p.capacity) {
      const int rank = rank_of_row(p, experts, static_cast<int32_t>(r));
      const int64_t at = r - p.offsets[rank * experts];
      place = at < p.capacity ? rank * p.capacity + at : -1;
    }
    const int32_t slot = p.row_map[r];
    if (lane() == 0) p.place_of_slot[slot] = static_cast<int32_t>(place);
    if (place < 0) continue;
    copy_row<Unit>(p.x + int64_t{slot / p.k} * p.ldx_bytes, p.out + place * p.row_bytes, p.row_bytes);
  }
}

// Each block sums the counts for itself: they are few, and a launch less.
__global__ void __launch_bounds__(kThreads) plan_receive_kernel(PlanReceive p) {
  SK_DYN_SMEM(int32_t, kept);  // [ranks * experts], by rank: rows that came
  const int pairs = p.ranks * p.experts;
  int32_t* const place = kept + pairs;   // the same, by rank: where they begin in the buffer
  int32_t* const first = place + pairs;  // by expert, [pairs + 1]: the row they begin at
  for (int rank = threadIdx.x; rank < p.ranks; rank += kThreads) {
    int64_t sum = 0;
    for (int e = 0; e < p.experts; ++e) {
      const int i = rank * p.experts + e;
      const int64_t room = p.capacity ? larger(p.capacity - sum, 0) : p.counts[i];
      kept[i] = static_cast<int32_t>(smaller(p.counts[i], room));
      place[i] = static_cast<int32_t>(rank * p.capacity + sum);
      sum += kept[i];
    }
  }
  __syncthreads();
  if (warp() == 0) {
    int32_t rows = 0, places = 0;
    for (int i0 = 0; i0 < pairs; i0 += kWarp) {
      const int i = i0 + lane();
      const bool is_there = i < pairs;
      const int32_t by_expert = is_there ? kept[i % p.ranks * p.experts + i / p.ranks] : 0;
      const int32_t sum = warp_inclusive_sum(by_expert);
      if (is_there) first[i] = rows + sum - by_expert;
      rows += __shfl_sync(kAllLanes, sum, kWarp - 1);
      if (p.capacity) continue;  // segments begin where they begin
      const int32_t by_rank = is_there ? kept[i] : 0, sum_by_rank = warp_inclusive_sum(by_rank);
      if (is_there) place[i] = places + sum_by_rank - by_rank;
      places += __shfl_sync(kAllLanes, sum_by_rank, kWarp - 1);
    }
    if (lane() == 0) first[pairs] = rows;
  }
  __syncthreads();
  if (blockIdx.x == 0)
    for (int e = threadIdx.x; e <= p.experts; e += kThreads) p.offsets[e] = first[e * p.ranks];
  for (int i = static_cast<int>(blockIdx.x) * kWarps + warp(); i < pairs; i += gridDim.x * kWarps)
    for (int32_t j = lane(); j < first[i + 1] - first[i]; j += kWarp)
      p.place_of_row[first[i] + j] = place[i % p.ranks * p.experts + i / p.ranks] + j;
  const int64_t threads = gridDim.x * int64_t{kThreads};
  for (int64_t r = first[pairs] + blockIdx.x * int64_t{kThreads} + threadIdx.x; r < p.rows; r += threads)
    p.place_of_row[r] = -1;
}

}  // namespace

cudaError_t pack(const Pack& p, cudaStream_t stream) {
  if (p.ranks < 1 || p.E % p.ranks) return cudaErrorInvalidValue;
  if (const cudaError_t error = cudaMemsetAsync(p.dropped, 0, sizeof(int32_t), stream)) return error;
  const dim3 grid(smaller(larger(ceil_div(p.R, kWarps), 1), kMaxBlocks));  // one block writes the counts
  with_unit(p.x, p.ldx_bytes, p.out, p.row_bytes,
            [&]<class Unit>() { SK_LAUNCH(pack_kernel<Unit>, grid, kThreads, 0, stream, p, p.E / p.ranks); });
  return cudaGetLastError();
}

cudaError_t plan_receive(const PlanReceive& p, cudaStream_t stream) {
  const int64_t pairs = int64_t{p.ranks} * p.experts, smem = (3 * pairs + 1) * sizeof(int32_t);
  if (pairs < 1 || smem > (48 << 10)) return cudaErrorInvalidValue;
  SK_LAUNCH(plan_receive_kernel, smaller(ceil_div(pairs, kWarps), 64), kThreads, smem, stream, p);
  return cudaGetLastError();
}

}  // namespace sigma::cuda
