// Three launches: count each chunk, sum the counts by (expert, chunk), place each chunk's slots.  A chunk
// knows where its rows begin, and inside it a warp knows, so no order of blocks or threads shows in the
// result. Bound: two reads of the indices, one write of the map, and E * chunks counts thrice.
#include "group.h"
#include "launch.cuh"

namespace sigma::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp, kMaxChunks = 512;
constexpr int64_t kSlotsPerChunk = 256;  // at least

// table[e][c] = slots of chunk c that go to expert e.
__global__ void __launch_bounds__(kThreads)
    count_slots_kernel(const int32_t* indices, int64_t R, int E, int64_t per_chunk, int chunks,
                       int32_t* table) {
  SK_DYN_SMEM(int32_t, local);  // [E]
  for (int e = threadIdx.x; e < E; e += kThreads) local[e] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * per_chunk, end = smaller(begin + per_chunk, R);
  for (int64_t s = begin + threadIdx.x; s < end; s += kThreads) atomicAdd(&local[indices[s]], 1);
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += kThreads) table[int64_t{e} * chunks + blockIdx.x] = local[e];
}

// Each expert's row of the table becomes the sums before each chunk; a warp an expert.
__global__ void __launch_bounds__(kThreads)
    sum_chunks_kernel(int E, int chunks, int32_t* table, int32_t* counts) {
  const int e = static_cast<int>(blockIdx.x) * kWarps + warp();
  if (e >= E) return;
  int32_t total = 0;
  for (int c0 = 0; c0 < chunks; c0 += kWarp) {
    int32_t* const place = &table[int64_t{e} * chunks + c0 + lane()];
    const bool is_there = c0 + lane() < chunks;
    const int32_t count = is_there ? *place : 0, sum = warp_inclusive_sum(count);
    if (is_there) *place = total + sum - count;
    total += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
  if (lane() == 0) counts[e] = total;
}

// first[e] = rows of the experts before e; by one warp.
__device__ void sum_counts(const int32_t* counts, int E, int32_t* first) {
  int32_t total = 0;
  for (int e0 = 0; e0 < E; e0 += kWarp) {
    const int32_t count = e0 + lane() < E ? counts[e0 + lane()] : 0, sum = warp_inclusive_sum(count);
    if (e0 + lane() < E) first[e0 + lane()] = total + sum - count;
    total += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
}

// row_map[row of slot s] = s for the slots of one chunk, cut into one piece a warp.
__global__ void __launch_bounds__(kThreads)
    place_slots_kernel(GroupByExpert g, int64_t per_chunk, int chunks) {
  SK_DYN_SMEM(int32_t, first);  // [E]
  const int warps = blockDim.x / kWarp;
  int32_t* const next = first + g.E;  // [warps][E]: counts, then the row that comes next
  int32_t* const mine = next + warp() * g.E;
  const int64_t begin = blockIdx.x * per_chunk, end = smaller(begin + per_chunk, g.R);
  const int64_t per_warp = ceil_div(ceil_div(per_chunk, warps), kWarp) * kWarp;
  const int64_t from = smaller(begin + warp() * per_warp, end), to = smaller(from + per_warp, end);

  for (int e = lane(); e < g.E; e += kWarp) mine[e] = 0;
  __syncwarp();
  for (int64_t s = from + lane(); s < to; s += kWarp) atomicAdd(&mine[g.indices[s]], 1);
  if (warp() == 0) sum_counts(g.counts, g.E, first);
  __syncthreads();
  for (int e = threadIdx.x; e < g.E; e += blockDim.x) {
    if (blockIdx.x == 0) g.offsets[e] = first[e];
    int32_t row = first[e] + (chunks ? g.workspace[int64_t{e} * chunks + blockIdx.x] : 0);
    for (int w = 0; w < warps; ++w) {
      const int32_t count = next[w * g.E + e];
      next[w * g.E + e] = row;
      row += count;
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) g.offsets[g.E] = static_cast<int32_t>(g.R);
  __syncthreads();
  for (int64_t s0 = from; s0 < to; s0 += kWarp) {
    const int64_t s = s0 + lane();
    const int32_t e = s < to ? g.indices[s] : -1;
    const unsigned peers = __match_any_sync(kAllLanes, e);
    const int before = __popc(peers & ((1u << lane()) - 1));
    if (e >= 0) g.row_map[mine[e] + before] = static_cast<int32_t>(s);
    __syncwarp();  // all have read before the first of each expert moves on
    if (e >= 0 && before == 0) mine[e] += __popc(peers);
    __syncwarp();
  }
}

}  // namespace

Chunks chunks_of(int64_t T, int k, int64_t at_least) {
  const int64_t tokens = ceil_div(larger(ceil_div(T, kMaxChunks), 1), at_least) * at_least;
  return {tokens * k, static_cast<int>(ceil_div(T, tokens))};
}

int64_t group_workspace(int64_t R, int E) {
  return int64_t{E} * chunks_of(R, 1, kSlotsPerChunk).count * sizeof(int32_t);
}

cudaError_t group_by_expert(const GroupByExpert& g, cudaStream_t stream) {
  if (g.E < 1 || g.E > kMaxGroups) return cudaErrorInvalidValue;
  const Chunks chunks = chunks_of(g.R, 1, kSlotsPerChunk);
  if (g.R)
    SK_LAUNCH(count_slots_kernel, chunks.count, kThreads, g.E * sizeof(int32_t), stream, g.indices, g.R, g.E,
              chunks.slots, chunks.count, g.workspace);
  return finish_groups(g, chunks, stream);
}

cudaError_t finish_groups(const GroupByExpert& g, Chunks chunks, cudaStream_t stream) {
  SK_LAUNCH(sum_chunks_kernel, ceil_div(g.E, kWarps), kThreads, 0, stream, g.E, chunks.count, g.workspace,
            g.counts);
  int warps = kWarps;
  const auto smem = [&] { return (warps + 1) * g.E * sizeof(int32_t); };
  while (smem() > (48 << 10)) warps /= 2;
  // One block where there is no slot either: the offsets are zeros all the same.
  SK_LAUNCH(place_slots_kernel, larger(chunks.count, 1), warps * kWarp, smem(), stream, g, chunks.slots,
            chunks.count);
  return cudaGetLastError();
}

}  // namespace sigma::cuda
