// M = rows of one expert, N and K as in the argument: a block has a tile of rows of one expert and 128
// columns.
//
// Which rows is found by each block from the offsets, so that the host need not know them: the grid is an
// upper bound of the tiles, and the blocks beyond the last return.  Rows are gathered as they are loaded and
// scattered as they are stored.  Bound where experts have few rows: one read of the weights.
#include "gemm_tile.cuh"
#include "grouped_gemm.h"

namespace sigma::cuda {
namespace {

struct RowTile {
  int expert;
  int64_t begin;
  int rows;  // 0: there is no such tile
};

// Every warp for itself: 32 experts a step.
__device__ RowTile find_tile(const int32_t* offsets, int E, int tile_rows, int tile) {
  int before = 0;
  for (int e0 = 0; e0 < E; e0 += kWarp) {
    const int e = e0 + lane();
    const int32_t begin = offsets[e < E ? e : E], end = offsets[e < E ? e + 1 : E];
    const int32_t tiles = static_cast<int32_t>(ceil_div(end - begin, tile_rows));
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
    grouped_gemm_kernel(GroupedGemm<T> g, bool reads_vectors, bool writes_vectors) {
  using Product = Tile<T, S, false, !kIsTransposed, kStages>;
  using TileA = typename Product::TileA;
  using TileB = typename Product::TileB;
  SK_DYN_SMEM(T, shared);
  const RowTile tile = find_tile(g.offsets, g.E, S::kM, static_cast<int>(blockIdx.x));
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
cudaError_t launch(const GroupedGemm<T>& g, cudaStream_t stream) {
  const int64_t tiles = g.R / S::kM + smaller(g.E, g.R);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(ceil_div(g.N, S::kN)));
  const bool reads = has_vectors(g.x.base, g.x.ld) && has_vectors(g.w, g.w_row) && g.w_expert % 8 == 0;
  const bool writes = has_vectors(g.y.base, g.y.ld);
  const auto run = [&]<bool kIsTransposed>() {
    return launch_tiles(grouped_gemm_kernel<T, S, kIsTransposed, kStages>, grid, S::kThreads,
                        Tile<T, S, false, !kIsTransposed, kStages>::kSharedBytes, stream, g, reads, writes);
  };
  return g.is_transposed ? run.template operator()<true>() : run.template operator()<false>();
}

}  // namespace

template <class T>
cudaError_t grouped_gemm(const GroupedGemm<T>& g, cudaStream_t stream) {
  if (g.R == 0 || g.N == 0) return cudaSuccess;
  // The least rows that hold an expert's average share: 96 experts leave 21 of 2,048 tokens each.
  const int64_t share = ceil_div(g.R, g.E);
  if (share <= 16) return launch<T, TileShape<1, 4, 1, 4>, 4>(g, stream);
  if (share <= 32) return launch<T, TileShape<1, 4, 2, 4>, 4>(g, stream);
  if (share <= 64) return launch<T, TileShape<2, 2, 2, 8>, 3>(g, stream);
  return launch<T, TileShape<4, 2, 2, 8>, 3>(g, stream);
}

template cudaError_t grouped_gemm(const GroupedGemm<Bf16>&, cudaStream_t);
template cudaError_t grouped_gemm(const GroupedGemm<F16>&, cudaStream_t);

}  // namespace sigma::cuda
