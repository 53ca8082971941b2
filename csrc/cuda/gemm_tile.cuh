// A block's tile of a product: operands through shared memory into the tensor cores, the result back through
// it.
//
// Shared rows are 16 bytes longer than their data, so that the eight rows of an 8x8 matrix lie in different
// banks.
#pragma once

#include <type_traits>

#include "grouped_gemm.h"
#include "tensor_core.cuh"

namespace sigma::cuda {

constexpr int kStep = 32;  // of the contraction, by one stage of the pipeline

// WM by WN warps, each with FM fragments of 16 rows and FN of 8 columns.
template <int WM, int WN, int FM, int FN>
struct TileShape {
  static constexpr int kWarpsM = WM, kWarpsN = WN, kFragmentsM = FM, kFragmentsN = FN;
  static constexpr int kM = WM * FM * 16, kN = WN * FN * 8, kThreads = WM * WN * kWarp;
};

// [kRows][kColumns] in shared memory, padded.
template <int kRows, int kColumns>
struct SharedTile {
  static constexpr int kPitch = kColumns + 8, kElements = kRows * kPitch;
  static constexpr int kChunks = kRows * kColumns / 8;

  // Row r of the tile is row(i, r) from c0 on, i being which of its chunks this thread is at; zeros where
  // there is no such row and beyond `columns`.
  template <int kThreads, class T, class Row>
  __device__ static void load(T* tile, Row row, int64_t c0, int64_t columns, bool has_vectors) {
#pragma unroll
    for (int i = 0; i < (kChunks + kThreads - 1) / kThreads; ++i) {
      const int chunk = i * kThreads + static_cast<int>(threadIdx.x);
      if (kChunks % kThreads && chunk >= kChunks) break;
      const int r = chunk / (kColumns / 8), c = chunk % (kColumns / 8) * 8;
      const T* const from = row(i, r);
      const int64_t left = from ? columns - c0 - c : 0;
      const int n = static_cast<int>(larger(smaller(left, 8), 0));
      T* const to = tile + r * kPitch + c;
      if (has_vectors) {
        copy_async(to, n ? from + c0 + c : nullptr, n * static_cast<int>(sizeof(T)));
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) to[j] = j < n ? from[c0 + c + j] : T{};
      }
    }
  }
};

// 16 of m and 16 of the contraction, from [m][k] or from [k][m].
template <bool kIsTransposed, int kPitch, class T>
__device__ void load_a(uint32_t (&a)[4], const T* tile, int m, int k) {
  const int l = lane();
  if (kIsTransposed)
    load_matrices_transposed(a, tile + (k + l / 16 * 8 + l % 8) * kPitch + m + l / 8 % 2 * 8);
  else
    load_matrices(a, tile + (m + l % 16) * kPitch + k + l / 16 * 8);
}

// 16 of the contraction and 2 times 8 of n, from [n][k] or from [k][n].
template <bool kIsTransposed, int kPitch, class T>
__device__ void load_b(uint32_t (&b)[4], const T* tile, int n, int k) {
  const int l = lane();
  if (kIsTransposed)
    load_matrices_transposed(b, tile + (k + l % 16) * kPitch + n + l / 16 * 8);
  else
    load_matrices(b, tile + (n + l / 16 * 8 + l % 8) * kPitch + k + l / 8 % 2 * 8);
}

// The product of one tile.  kA, kB: whether an operand lies with the contraction along its rows.
template <class T, class S, bool kA, bool kB, int kStages>
struct Tile {
  static constexpr int kFragmentsM = S::kFragmentsM, kFragmentsN = S::kFragmentsN;
  using TileA = std::conditional_t<kA, SharedTile<kStep, S::kM>, SharedTile<S::kM, kStep>>;
  using TileB = std::conditional_t<kB, SharedTile<kStep, S::kN>, SharedTile<S::kN, kStep>>;
  using TileC = SharedTile<S::kM, S::kN>;
  static constexpr int kStage = TileA::kElements + TileB::kElements;
  static constexpr int kSharedBytes =
      (kStages * kStage > TileC::kElements ? kStages * kStage : TileC::kElements) *
      static_cast<int>(sizeof(T));

  static_assert(kSharedBytes <= (163 << 10), "sm_80 has no more for a block");

  float sum[kFragmentsM][kFragmentsN][4] = {};

  __device__ static int first_row() { return warp() / S::kWarpsN * kFragmentsM * 16; }
  __device__ static int first_column() { return warp() % S::kWarpsN * kFragmentsN * 8; }

  // `load(stage, step)` starts the copies of one step.  Rows from `rows` on are not computed.
  template <class Load>
  __device__ void multiply(T* shared, int steps, int rows, Load load) {
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < steps) load(shared + s * kStage, s);
      commit_copies();
    }
    for (int s = 0; s < steps; ++s) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // step s is there for all, and none reads the stage that is filled next
      const int next = s + kStages - 1;
      if (next < steps) load(shared + next % kStages * kStage, next);
      commit_copies();
      add(shared + s % kStages * kStage, rows);
    }
    wait_for_copies<0>();
    __syncthreads();
  }

  // factor(row) times the sums, rounded, into shared memory.
  template <class Factor>
  __device__ void round(T* shared, int rows, Factor factor) {
#pragma unroll
    for (int m = 0; m < kFragmentsM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row() + m * 16 + half * 8 + lane() / 4;
        if (row >= rows) continue;
        const float f = factor(row);
#pragma unroll
        for (int n = 0; n < kFragmentsN; ++n) {
          const float* const x = &sum[m][n][half * 2];
          const int column = first_column() + n * 8 + lane() % 4 * 2;
          *reinterpret_cast<Vector<T, 2>*>(shared + row * TileC::kPitch + column) = {from_float<T>(f * x[0]),
                                                                                     from_float<T>(f * x[1])};
        }
      }
    __syncthreads();
  }

  // From there to row(r) + column, 16 bytes at once where the addresses allow it; rows that are null are left
  // out.
  template <class Row>
  __device__ static void write(const T* shared, int rows, int64_t columns, bool has_vectors, bool adds,
                               Row row) {
    for (int chunk = threadIdx.x; chunk < rows * (S::kN / 8); chunk += S::kThreads) {
      const int r = chunk / (S::kN / 8), c = chunk % (S::kN / 8) * 8;
      T* const to = row(r);
      const T* const from = shared + r * TileC::kPitch + c;
      if (!to || c >= columns) continue;
      if (has_vectors && c + 8 <= columns) {
        auto part = *reinterpret_cast<const Vector<T, 8>*>(from);
        auto* const place = reinterpret_cast<Vector<T, 8>*>(to + c);
        if (adds) {
          const auto before = *place;
#pragma unroll
          for (int j = 0; j < 8; ++j) part.x[j] = from_float<T>(to_float(before.x[j]) + to_float(part.x[j]));
        }
        *place = part;
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (c + j < columns)
            to[c + j] = adds ? from_float<T>(to_float(to[c + j]) + to_float(from[j])) : from[j];
      }
    }
  }

 private:
  __device__ void add(const T* stage, int rows) {
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      uint32_t a[kFragmentsM][4];
#pragma unroll
      for (int m = 0; m < kFragmentsM; ++m)
        if (first_row() + m * 16 < rows) load_a<kA, TileA::kPitch>(a[m], stage, first_row() + m * 16, k);
#pragma unroll
      for (int n = 0; n < kFragmentsN; n += 2) {
        uint32_t b[4];
        load_b<kB, TileB::kPitch>(b, stage + TileA::kElements, first_column() + n * 8, k);
#pragma unroll
        for (int m = 0; m < kFragmentsM; ++m)
          if (first_row() + m * 16 < rows) {
            mma<T>(sum[m][n], a[m], {b[0], b[1]});
            mma<T>(sum[m][n + 1], a[m], {b[2], b[3]});
          }
      }
    }
  }
};

// Where row r of a matrix begins; null for a negative index.
template <class T>
__device__ T* row_of(const Rows<T>& m, int64_t r) {
  if (!m.index) return m.base + r * m.ld;
  const int32_t i = m.index[r];
  return i < 0 ? nullptr : m.base + int64_t{i / m.divisor} * m.ld;
}

// More shared memory than 48 KiB must be asked for, each time anew, as devices differ and may change.
template <class Kernel, class... Arguments>
cudaError_t launch_tiles(Kernel* kernel, dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                         const Arguments&... arguments) {
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
    return error;
  SK_LAUNCH(kernel, grid, threads, shared_bytes, stream, arguments...);
  return cudaGetLastError();
}

}  // namespace sigma::cuda
