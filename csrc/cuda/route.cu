// A warp a token; each block counts what its tokens chose, for the order of rows (group.h), and where sums
// over the tokens are wanted adds its warps' in order.  A second kernel adds the blocks', in order again: the
// tokens of a warp and of a block follow from T alone, so the sums have the same bits at every run.
//
// Without a bias the order of the scores is the order of the logits, so the choice is made on the logits:
// exact, however flat the scores.  NaN ranks as -infinity, ties go to the lower index.  Bound: one read of
// the logits.
#include "group.h"
#include "route.h"
#include "route_row.cuh"
#include "router_sums.cuh"

namespace sigma::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;

// A count of each expert and, where wanted, the sums of each warp, in shared memory.
constexpr int64_t shared_bytes(int E, bool has_sums) {
  return (E + (has_sums ? kWarps * (E + 1) : 0)) * sizeof(int32_t);
}
static_assert(sizeof(float) == sizeof(int32_t) && shared_bytes(kMaxExperts, true) <= 48 << 10);

// Rises with x, -0 being 0 and NaN -infinity; never 0, which is for what may not be chosen.
__device__ uint32_t rank(float x) {
  const uint32_t bits = __float_as_uint(x == x ? x + 0.0f : -kInfinity);
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

// The index of the largest, the lowest of equals.
template <int N>
__device__ int32_t best_of(const uint32_t (&ranks)[4 * N]) {
  uint32_t best = 0;
  int at = 0;
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) {
    if (ranks[i] > best) at = i;
    best = ranks[i] > best ? ranks[i] : best;
  }
  const uint32_t most = __reduce_max_sync(kAllLanes, best);
  const unsigned holders = __ballot_sync(kAllLanes, best == most);
  const int index = LogitRow<N>::index(at);
  if (N == 1) return __shfl_sync(kAllLanes, index, __ffs(holders) - 1);  // lanes are in the order of indices
  return __reduce_min_sync(kAllLanes, best == most ? index : 0x7FFFFFFF);
}

template <int N>
__device__ void choose(const Route& r, const LogitRow<N>& row, int32_t* indices) {
  uint32_t ranks[4 * N];
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) ranks[i] = LogitRow<N>::index(i) < r.E ? rank(row.v[i]) : 0;
  for (int j = 0; j < r.k; ++j) {
    const int32_t e = best_of<N>(ranks);
    if (lane() == j % kWarp) indices[j] = e;  // the lane that reads it again in each_choice
    if (j + 1 == r.k) break;
#pragma unroll
    for (int i = 0; i < 4 * N; ++i)
      if (LogitRow<N>::index(i) == e) ranks[i] = 0;
  }
}

template <int N, bool kHasSums>
__device__ void route_token(const Route& r, int64_t t, bool has_vectors, int32_t* count, WarpSums<N>& sums) {
  const float* const logits = r.logits + t * r.ld;
  int32_t* const indices = r.indices + t * r.k;
  float* const weights = r.weights + t * r.k;
  LogitRow<N> row;
  row.load(logits, r.E, has_vectors);
  float max = 0.0f, inverse_sum = 1.0f;
  if (kHasSums || r.is_softmax) {
    max = row.max();
    const float exps = row.sum_exp(max);
    if (r.is_softmax) inverse_sum = 1.0f / exps;
    if constexpr (kHasSums) sums.add(row, r.sums_softmax, max, exps);
  }
  if (r.bias)
    row.each(r.E, [&](float& x, int e) {
      x = (r.is_softmax ? expf(x - max) * inverse_sum : sigmoid(x)) + r.bias[e];
    });
  choose(r, row, indices);
  if (r.is_normalized) {  // a softmax that is normalised over the chosen is the softmax of the chosen
    max = -kInfinity;
    each_choice(logits, indices, r.k, [&](int, float x) { max = fmaxf(max, x); });
    max = warp_max(max);
    float sum = 0.0f;
    each_choice(logits, indices, r.k, [&](int, float x) { sum += chosen_score(r, x, max); });
    inverse_sum = 1.0f / warp_sum(sum);
  }
  each_choice(logits, indices, r.k, [&](int j, float x) {
    weights[j] = chosen_score(r, x, max) * inverse_sum;
    atomicAdd(&count[indices[j]], 1);
  });
}

template <int N, bool kHasSums>
__global__ void __launch_bounds__(kThreads)
    route_kernel(Route r, int64_t per_chunk, int chunks, bool has_vectors, float* partial) {
  SK_DYN_SMEM(int32_t, count);                                   // [E]
  float* const by_warp = reinterpret_cast<float*>(count + r.E);  // [kWarps, E + 1]
  WarpSums<N> sums{};
  for (int e = threadIdx.x; e < r.E; e += kThreads) count[e] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * per_chunk, end = smaller(begin + per_chunk, r.T);
  for (int64_t t = begin + warp(); t < end; t += kWarps)
    route_token<N, kHasSums>(r, t, has_vectors, count, sums);
  if constexpr (kHasSums) sums.store(by_warp + warp() * (r.E + 1), r.E);
  __syncthreads();
  for (int e = threadIdx.x; e < r.E; e += kThreads) r.workspace[int64_t{e} * chunks + blockIdx.x] = count[e];
  if constexpr (kHasSums)
    for (int e = threadIdx.x; e <= r.E; e += kThreads) {
      float sum = 0.0f;
      for (int w = 0; w < kWarps; ++w) sum += by_warp[w * (r.E + 1) + e];
      partial[int64_t{blockIdx.x} * (r.E + 1) + e] = sum;
    }
}

// The sums of all blocks from partial [blocks, E + 1].  A block of threads has 32 columns, and a warp of it
// one piece of the rows: hundreds of rows one after another would be a wait for memory each.
__global__ void __launch_bounds__(kThreads) add_partials_kernel(Route r, const float* partial, int blocks) {
  __shared__ double by_warp[kWarps][kWarp];
  const int column = static_cast<int>(blockIdx.x) * kWarp + lane(), piece = (blocks + kWarps - 1) / kWarps;
  const int begin = warp() * piece, end = static_cast<int>(smaller(begin + piece, blocks));
  double sum = 0.0;
  if (column <= r.E) {
#pragma unroll 8
    for (int b = begin; b < end; ++b) sum += partial[int64_t{b} * (r.E + 1) + column];
  }
  by_warp[warp()][lane()] = sum;
  __syncthreads();
  if (warp() != 0 || column > r.E) return;
  for (int w = 1; w < kWarps; ++w) sum += by_warp[w][lane()];
  *(column < r.E ? r.probabilities + column : r.square) = static_cast<float>(sum);
}

bool has_vectors(const float* logits, int64_t ld) { return is_aligned(logits, 16) && ld % 4 == 0; }

}  // namespace

int64_t route_workspace(int64_t T, int E, bool has_sums) {
  return (E + (has_sums ? E + 1 : 0)) * int64_t{chunks_of(T, 1, kWarps).count} * sizeof(int32_t);
}

cudaError_t route(const Route& r, cudaStream_t stream) {
  if (r.E < 1 || r.E > kMaxExperts || r.k < 1 || r.k > r.E) return cudaErrorInvalidValue;
  const Chunks chunks = chunks_of(r.T, r.k, kWarps);
  const bool has_sums = r.probabilities;
  float* const partial = reinterpret_cast<float*>(r.workspace + int64_t{r.E} * chunks.count);
  if (r.T)
    with_row_size(r.E, [&]<int N>() {
      const auto kernel = has_sums ? route_kernel<N, true> : route_kernel<N, false>;
      SK_LAUNCH(kernel, chunks.count, kThreads, shared_bytes(r.E, has_sums), stream, r, chunks.slots / r.k,
                chunks.count, has_vectors(r.logits, r.ld), partial);
    });
  if (has_sums)  // with no token as well: the sums are zeros then
    SK_LAUNCH(add_partials_kernel, ceil_div(r.E + 1, kWarp), kThreads, 0, stream, r, partial, chunks.count);
  return finish_groups({.R = r.T * r.k,
                        .E = r.E,
                        .indices = r.indices,
                        .counts = r.counts,
                        .offsets = r.offsets,
                        .row_map = r.row_map,
                        .workspace = r.workspace},
                       chunks, stream);
}

}  // namespace sigma::cuda
