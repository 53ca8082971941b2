// M = rows of one expert, N and K as in the argument: a block has a tile of rows of one expert and 128
// columns.
//
// Which rows is found by each block from the offsets, so that the host need not know them: the grid is an
// upper bound of the tiles, and the blocks beyond the last return.  A launch serves the experts whose rows
// lie in an interval, so that one of 20 rows pays for 32 and a crowded one still has tiles of 128.  Rows are
// gathered as they are loaded and scattered as they are stored.  Bound where experts have few rows: one read
// of the weights.
#include "gemm_tile.cuh"
#include "grouped_gemm.h"

namespace sigma::cuda {
namespace {

struct RowTile {
  int expert;
  int64_t begin;
  int rows;  // 0: there is no such tile
};

struct Interval {
  int32_t least, most;  // an expert is served that has least < rows <= most
};

// Every warp for itself: 32 experts a step.
__device__ RowTile find_tile(const int32_t* offsets, int E, Interval served, int tile_rows, int tile) {
  int before = 0;
  for (int e0 = 0; e0 < E; e0 += kWarp) {
    const int e = e0 + lane();
    const int32_t begin = offsets[e < E ? e : E], end = offsets[e < E ? e + 1 : E];
    const bool is_served = end - begin > served.least && end - begin <= served.most;
    const int32_t tiles = is_served ? static_cast<int32_t>(ceil_div(end - begin, tile_rows)) : 0;
    const int32_t sum = before + warp_inclusive_sum(tiles);
    if (const unsigned beyond = __ballot_sync(kAllLanes, sum > tile)) {
      const int at = __ffs(beyond) - 1;
      const int32_t first = begin + (tile - (sum - tiles)) * tile_rows;
      const int32_t rows = static_cast<int32_t>(smaller(tile_rows, end - first));
      return {e0 + at, __shfl_sync(kAllLanes, first, at), __shfl_sync(kAllLanes, rows, at)};
    }
    before = __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
  return {0, 0, 0};
}

template <class T, class S, bool kIsTransposed, int kStages>
__global__ void __launch_bounds__(S::kThreads)
    grouped_gemm_kernel(GroupedGemm<T> g, Interval served, bool reads_vectors, bool writes_vectors) {
  using Product = Tile<T, S, false, !kIsTransposed, kStages>;
  using TileA = typename Product::TileA;
  using TileB = typename Product::TileB;
  SK_DYN_SMEM(T, shared);
  const RowTile tile = find_tile(g.offsets, g.E, served, S::kM, static_cast<int>(blockIdx.x));
  if (tile.rows == 0) return;
  const int64_t n0 = blockIdx.y * int64_t{S::kN};

  // A thread's chunks of x stay in the same rows, so their index is read once.
  constexpr int kChunks = static_cast<int>(ceil_div(TileA::kChunks, S::kThreads));
  const T* rows_of_x[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int r = (i * S::kThreads + static_cast<int>(threadIdx.x)) / (kStep / 8);
    rows_of_x[i] = r < tile.rows ? row_of(g.x, tile.begin + r) : nullptr;
  }
  const T* const w = g.w + tile.expert * g.w_expert;
  const auto load = [&](T* stage, int step) {
    const int64_t k0 = int64_t{step} * kStep;
    TileA::template load<S::kThreads>(
        stage, [&](int i, int) { return rows_of_x[i]; }, k0, g.K, reads_vectors);
    T* const tile_b = stage + TileA::kElements;
    if constexpr (kIsTransposed)
      TileB::template load<S::kThreads>(
          tile_b, [&](int, int n) { return n0 + n < g.N ? w + (n0 + n) * g.w_row : nullptr; }, k0, g.K,
          reads_vectors);
    else
      TileB::template load<S::kThreads>(
          tile_b, [&](int, int k) { return k0 + k < g.K ? w + (k0 + k) * g.w_row : nullptr; }, n0, g.N,
          reads_vectors);
  };
  Product product;
  product.multiply(shared, static_cast<int>(ceil_div(g.K, kStep)), tile.rows, load);
  product.round(shared, tile.rows, [&](int r) {
    const int64_t row = tile.begin + r;
    return g.scale ? g.scale[g.slot_of_row ? g.slot_of_row[row] : row] : 1.0f;
  });
  Product::write(shared, tile.rows, g.N - n0, writes_vectors, false, [&](int r) {
    T* const row = row_of(g.y, tile.begin + r);
    return row ? row + n0 : nullptr;
  });
}

template <class T, class S, int kStages>
cudaError_t launch(const GroupedGemm<T>& g, Interval served, cudaStream_t stream) {
  const int64_t experts = smaller(g.E, g.R / (int64_t{served.least} + 1));  // that can have so many rows
  if (experts == 0) return cudaSuccess;
  const int64_t tiles = g.R / S::kM + experts;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(ceil_div(g.N, S::kN)));
  const bool reads = has_vectors(g.x.base, g.x.ld) && has_vectors(g.w, g.w_row) && g.w_expert % 8 == 0;
  const bool writes = has_vectors(g.y.base, g.y.ld);
  const auto run = [&]<bool kIsTransposed>() {
    return launch_tiles(grouped_gemm_kernel<T, S, kIsTransposed, kStages>, grid, S::kThreads,
                        Tile<T, S, false, !kIsTransposed, kStages>::kSharedBytes, stream, g, served, reads,
                        writes);
  };
  return g.is_transposed ? run.template operator()<true>() : run.template operator()<false>();
}

}  // namespace

template <class T>
cudaError_t grouped_gemm(const GroupedGemm<T>& g, cudaStream_t stream) {
  if (g.R == 0 || g.N == 0) return cudaSuccess;
  using Rows16 = TileShape<1, 4, 1, 4>;
  using Rows32 = TileShape<1, 4, 2, 4>;
  using Rows64 = TileShape<2, 2, 2, 8>;
  using Rows128 = TileShape<4, 2, 2, 8>;
  constexpr int32_t kAll = 0x7FFFFFFF;
  // What an expert has on average decides the tile of the many; 96 experts leave 21 of 2,048 tokens each.
  const int64_t share = ceil_div(g.R, g.E);
  const auto both = [&]<class Few, int kStagesOfFew, class Many>() {
    const cudaError_t error = launch<T, Few, kStagesOfFew>(g, {0, Few::kM}, stream);
    return error == cudaSuccess ? launch<T, Many, 3>(g, {Few::kM, kAll}, stream) : error;
  };
  if (share <= 8) return both.template operator()<Rows16, 4, Rows64>();
  if (share <= 32) return both.template operator()<Rows32, 4, Rows128>();
  if (share <= 128) return both.template operator()<Rows64, 3, Rows128>();
  return launch<T, Rows128, 3>(g, {0, kAll}, stream);
}

template cudaError_t grouped_gemm(const GroupedGemm<Bf16>&, cudaStream_t);
template cudaError_t grouped_gemm(const GroupedGemm<F16>&, cudaStream_t);

}  // namespace sigma::cuda
