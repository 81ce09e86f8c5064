// Kernels of multi-scale deformable attention on CUDA, by storage type: what the binding calls.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace deform_attn {

constexpr int kMaxLevels = 16;

// By value, so that it lies in the constant bank and no kernel waits for a copy.
struct Levels {
  int count;
  int height[kMaxLevels], width[kMaxLevels], start[kMaxLevels];
  int point_end[kMaxLevels];  // points of this level and the ones before it
};

// Real: double for double values, float else. All tensors contiguous.
template <class S, class Real>
struct CudaCall {
  int64_t batch, cells, queries;
  int heads, dim, points;
  uint32_t row_bytes;  // from one cell of `value` to the next; the launch sets it
  Levels levels;
  const S* value;            // (batch, cells, heads, dim)
  const Real* locations;     // (batch, queries, heads, points, 2)
  const Real* weights;       // (batch, queries, heads, points)
  S* out;                    // (batch, queries, heads * dim)
  const S* grad_out;         // as out
  Real* grad_value;          // as value, zeros; not used when `fixed` is there
  Real* grad_locations;      // as locations
  Real* grad_weights;        // as weights
  unsigned long long* fixed; // as value, zeros: 64-bit fixed-point sums of a deterministic backward, or null
  const Real* bound;         // one number: no contribution to grad_value is larger; with `fixed`
  int headroom;              // bits of the largest contribution; with `fixed`
};

template <class S, class Real>
cudaError_t launch_forward(const CudaCall<S, Real>& call, cudaStream_t stream);

template <class S, class Real>
cudaError_t launch_backward(const CudaCall<S, Real>& call, cudaStream_t stream);

}  // namespace deform_attn
