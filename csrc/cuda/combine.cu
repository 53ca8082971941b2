// Rows in expert order back to their tokens, weighted, and the gradient of that; a warp a token or a row.
// No atomics: each sum has one owner and one order.  Bound: bytes.
#include "launch.cuh"
#include "number.cuh"
#include "rows.h"

namespace sigma::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int64_t kMaxBlocks = 1 << 20;

template <class T, int V>
__global__ void __launch_bounds__(kThreads) combine_kernel(Combine<T> c) {
  for (int64_t t = blockIdx.x * int64_t{kWarps} + warp(); t < c.tokens; t += gridDim.x * int64_t{kWarps}) {
    each_part<V>(c.H, [&]<int N>(int64_t column) {
      float sum[N] = {};
#pragma unroll 2  // unrolled by four, which ptxas would rather, registers spill
      for (int j = 0; j < c.k; ++j) {
        const int64_t slot = t * c.k + j, row = c.row_of_slot ? c.row_of_slot[slot] : slot;
        if (row < 0) continue;
        const float weight = c.weights ? c.weights[slot] : 1.0f;
        const auto part = *reinterpret_cast<const Vector<T, N>*>(c.y + row * c.ldy + column);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += weight * to_float(part.x[i]);
      }
      Vector<T, N> out;
#pragma unroll
      for (int i = 0; i < N; ++i) out.x[i] = from_float<T>(sum[i]);
      *reinterpret_cast<Vector<T, N>*>(c.out + t * c.ld_out + column) = out;
    });
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) combine_backward_kernel(CombineBackward<T> c) {
  for (int64_t r = blockIdx.x * int64_t{kWarps} + warp(); r < c.R; r += gridDim.x * int64_t{kWarps}) {
    const int32_t slot = c.row_map[r];
    const int64_t t = slot / c.k;  // of 32 bits: one of 64 is a call, for which registers spill
    const float weight = c.weights[slot];
    float dot = 0.0f;
    each_part<V>(c.H, [&]<int N>(int64_t column) {
      const auto grad = *reinterpret_cast<const Vector<T, N>*>(c.grad_out + t * c.ld_grad + column);
      if (c.grad_weights) {
        const auto y = *reinterpret_cast<const Vector<T, N>*>(c.y + r * c.ldy + column);
#pragma unroll
        for (int i = 0; i < N; ++i) dot += to_float(grad.x[i]) * to_float(y.x[i]);
      }
      if (!c.grad_y) return;
      Vector<T, N> out;
#pragma unroll
      for (int i = 0; i < N; ++i) out.x[i] = from_float<T>(weight * to_float(grad.x[i]));
      *reinterpret_cast<Vector<T, N>*>(c.grad_y + r * c.H + column) = out;
    });
    if (!c.grad_weights) continue;
    dot = warp_sum(dot);
    if (lane() == 0) c.grad_weights[slot] = dot;
  }
}

}  // namespace

template <class T>
cudaError_t combine(const Combine<T>& c, cudaStream_t stream) {
  if (c.tokens == 0 || c.H == 0) return cudaSuccess;
  const dim3 grid(smaller(ceil_div(c.tokens, kWarps), kMaxBlocks));
  if (has_vectors(c.y, c.ldy) && has_vectors(c.out, c.ld_out))
    SK_LAUNCH((combine_kernel<T, kVector<T>>), grid, kThreads, 0, stream, c);
  else
    SK_LAUNCH((combine_kernel<T, 1>), grid, kThreads, 0, stream, c);
  return cudaGetLastError();
}

template <class T>
cudaError_t combine_backward(const CombineBackward<T>& c, cudaStream_t stream) {
  if (c.R == 0) return cudaSuccess;
  const dim3 grid(smaller(ceil_div(c.R, kWarps), kMaxBlocks));
  if (has_vectors(c.grad_out, c.ld_grad) && has_vectors(c.y, c.ldy) && has_vectors(c.grad_y, c.H))
    SK_LAUNCH((combine_backward_kernel<T, kVector<T>>), grid, kThreads, 0, stream, c);
  else
    SK_LAUNCH((combine_backward_kernel<T, 1>), grid, kThreads, 0, stream, c);
  return cudaGetLastError();
}

template cudaError_t combine(const Combine<float>&, cudaStream_t);
template cudaError_t combine(const Combine<Bf16>&, cudaStream_t);
template cudaError_t combine(const Combine<F16>&, cudaStream_t);
template cudaError_t combine_backward(const CombineBackward<float>&, cudaStream_t);
template cudaError_t combine_backward(const CombineBackward<Bf16>&, cudaStream_t);
template cudaError_t combine_backward(const CombineBackward<F16>&, cudaStream_t);

}  // namespace sigma::cuda
