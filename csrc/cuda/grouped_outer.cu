// M = A, N = B, K = the rows of one expert: a block has a 64 by 128 tile of one expert's result.
// Each element has one owner and one order of sums.  Bound where experts have few rows: one write of the
// result.
#include "gemm_tile.cuh"
#include "grouped_gemm.h"

namespace sigma::cuda {
namespace {

using Shape = TileShape<2, 2, 2, 8>;
constexpr int kStages = 3;
template <class T>
using Product = Tile<T, Shape, true, true, kStages>;

template <class T>
__global__ void __launch_bounds__(Shape::kThreads)
    grouped_outer_kernel(GroupedOuter<T> g, bool reads_vectors, bool writes_vectors) {
  using TileA = typename Product<T>::TileA;
  using TileB = typename Product<T>::TileB;
  SK_DYN_SMEM(T, shared);
  const int e = static_cast<int>(blockIdx.z);
  const int64_t begin = g.offsets[e], end = g.offsets[e + 1];
  if (begin == end && g.adds) return;
  const int64_t b0 = blockIdx.x * int64_t{Shape::kN}, a0 = blockIdx.y * int64_t{Shape::kM};
  const int rows = static_cast<int>(smaller(Shape::kM, g.A - a0));

  const auto load = [&](T* stage, int step) {
    const int64_t r0 = begin + int64_t{step} * kStep;
    const auto row_in = [&](const Rows<const T>& m) {
      return [&](int, int r) -> const T* { return r0 + r < end ? row_of(m, r0 + r) : nullptr; };
    };
    TileA::template load<Shape::kThreads>(stage, row_in(g.a), a0, g.A, reads_vectors);
    TileB::template load<Shape::kThreads>(stage + TileA::kElements, row_in(g.b), b0, g.B, reads_vectors);
  };
  Product<T> product;
  product.multiply(shared, static_cast<int>(ceil_div(end - begin, kStep)), rows, load);
  product.round(shared, rows, [](int) { return 1.0f; });
  T* const out = g.out + e * g.out_expert + a0 * g.out_row + b0;
  Product<T>::write(shared, rows, g.B - b0, writes_vectors, g.adds,
                    [&](int r) { return out + r * g.out_row; });
}

}  // namespace

template <class T>
cudaError_t grouped_outer(const GroupedOuter<T>& g, cudaStream_t stream) {
  if (g.A == 0 || g.B == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div(g.B, Shape::kN)),
                  static_cast<unsigned>(ceil_div(g.A, Shape::kM)), static_cast<unsigned>(g.E));
  return launch_tiles(grouped_outer_kernel<T>, grid, Shape::kThreads, Product<T>::kSharedBytes, stream, g,
                      has_vectors(g.a.base, g.a.ld) && has_vectors(g.b.base, g.b.ld),
                      has_vectors(g.out, g.out_row) && g.out_expert % 8 == 0);
}

template cudaError_t grouped_outer(const GroupedOuter<Bf16>&, cudaStream_t);
template cudaError_t grouped_outer(const GroupedOuter<F16>&, cudaStream_t);

}  // namespace sigma::cuda
