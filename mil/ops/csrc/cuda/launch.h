// Kernels of sparse deformable attention on CUDA, by storage type: what the binding calls.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace deform_attn {

constexpr int kMaxLevels = 16, kMaxMaps = 128;

// The bags of one launch: by value, so that it lies in the constant bank and no kernel waits for a copy. Batches with more
// maps take several launches.
struct Bags {
  int count, levels;
  int64_t first_query, end[kMaxMaps];                         // the query after the last one of each bag
  int height[kMaxMaps], width[kMaxMaps], start[kMaxMaps];     // of (bag, level)
  int point_end[kMaxLevels];                                  // points of this level and the ones before it
};

// Real: double for double values, float else. All tensors contiguous.
template <class S, class Real>
struct CudaCall {
  int64_t rows;
  int heads, dim, points, renormalise;
  uint32_t row_bytes;  // from one row of `value` to the next; the launch sets it
  Bags bags;
  const int32_t* maps;       // cells of all maps: row of `value` or -1
  const S* value;            // (rows, heads, dim)
  const Real* locations;     // (queries, heads, points, 2), in cells, a cell's centre at integers
  const Real* weights;       // (queries, heads, points)
  S* out;                    // (queries, heads * dim)
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

// Adds to grad_value, or to fixed; the last launch of a backward with fixed is followed by `launch_from_fixed`.
template <class S, class Real>
cudaError_t launch_backward(const CudaCall<S, Real>& call, cudaStream_t stream);

template <class S, class Real>
cudaError_t launch_from_fixed(const CudaCall<S, Real>& call, cudaStream_t stream);

}  // namespace deform_attn
