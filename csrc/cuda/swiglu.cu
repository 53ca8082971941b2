// A warp a row.  Bound: bytes.
#include "launch.cuh"
#include "number.cuh"
#include "swiglu.h"

namespace sigma::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int64_t kMaxBlocks = 1 << 20;

template <class T, int V>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(Swiglu<T> s) {
  for (int64_t r = blockIdx.x * int64_t{kWarps} + warp(); r < s.R; r += gridDim.x * int64_t{kWarps})
    each_part<V>(s.I, [&]<int N>(int64_t i) {
      const T* const row = s.gate_up + r * 2 * s.I + i;
      const auto gate = *reinterpret_cast<const Vector<T, N>*>(row);
      const auto up = *reinterpret_cast<const Vector<T, N>*>(row + s.I);
      Vector<T, N> out;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float g = to_float(gate.x[j]);
        out.x[j] = from_float<T>(__fdividef(g, 1.0f + __expf(-g)) * to_float(up.x[j]));
      }
      *reinterpret_cast<Vector<T, N>*>(s.hidden + r * s.I + i) = out;
    });
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) swiglu_backward_kernel(SwigluBackward<T> s) {
  for (int64_t r = blockIdx.x * int64_t{kWarps} + warp(); r < s.R; r += gridDim.x * int64_t{kWarps}) {
    const int32_t slot = s.slot_of_row[r];
    const float weight = s.weights[slot];
    float dot = 0.0f;
    each_part<V>(s.I, [&]<int N>(int64_t i) {
      using Part = Vector<T, N>;
      const int64_t at = r * 2 * s.I + i;
      const auto gate = *reinterpret_cast<const Part*>(s.gate_up + at);
      const auto up = *reinterpret_cast<const Part*>(s.gate_up + at + s.I);
      const auto grad = *reinterpret_cast<const Part*>(s.grad_hidden + r * s.I + i);
      Part grad_gate, grad_up, weighted;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float g = to_float(gate.x[j]), u = to_float(up.x[j]), d = to_float(grad.x[j]);
        const float sigmoid = __fdividef(1.0f, 1.0f + __expf(-g)), silu = g * sigmoid;
        dot += d * silu * u;
        grad_gate.x[j] = from_float<T>(weight * d * u * (sigmoid + silu * (1.0f - sigmoid)));
        grad_up.x[j] = from_float<T>(weight * d * silu);
        weighted.x[j] = from_float<T>(weight * silu * u);
      }
      *reinterpret_cast<Part*>(s.grad_gate_up + at) = grad_gate;
      *reinterpret_cast<Part*>(s.grad_gate_up + at + s.I) = grad_up;
      *reinterpret_cast<Part*>(s.weighted + r * s.I + i) = weighted;
    });
    dot = warp_sum(dot);
    if (lane() == 0) s.grad_weights[slot] = dot;
  }
}

}  // namespace

template <class T>
cudaError_t swiglu(const Swiglu<T>& s, cudaStream_t stream) {
  if (s.R == 0 || s.I == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(smaller(ceil_div(s.R, kWarps), kMaxBlocks)));
  if (has_vectors(s.gate_up, s.I) && has_vectors(s.hidden, s.I))
    SK_LAUNCH((swiglu_kernel<T, kVector<T>>), grid, kThreads, 0, stream, s);
  else
    SK_LAUNCH((swiglu_kernel<T, 1>), grid, kThreads, 0, stream, s);
  return cudaGetLastError();
}

template <class T>
cudaError_t swiglu_backward(const SwigluBackward<T>& s, cudaStream_t stream) {
  if (s.R == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(smaller(ceil_div(s.R, kWarps), kMaxBlocks)));
  if (has_vectors(s.gate_up, s.I) && has_vectors(s.grad_hidden, s.I) && has_vectors(s.grad_gate_up, s.I) &&
      has_vectors(s.weighted, s.I))
    SK_LAUNCH((swiglu_backward_kernel<T, kVector<T>>), grid, kThreads, 0, stream, s);
  else
    SK_LAUNCH((swiglu_backward_kernel<T, 1>), grid, kThreads, 0, stream, s);
  return cudaGetLastError();
}

template cudaError_t swiglu(const Swiglu<Bf16>&, cudaStream_t);
template cudaError_t swiglu(const Swiglu<F16>&, cudaStream_t);
template cudaError_t swiglu_backward(const SwigluBackward<Bf16>&, cudaStream_t);
template cudaError_t swiglu_backward(const SwigluBackward<F16>&, cudaStream_t);

}  // namespace sigma::cuda
