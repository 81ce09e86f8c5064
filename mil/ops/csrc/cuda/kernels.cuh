// Forward and backward of sparse deformable attention on CUDA; mathematics as in ../cpu/kernel.h.
//
// A group of 1 to 32 lanes shares a (query, head), each lane with 16 bytes of channels. The lanes work out different points,
// four look-ups in the map each, and pass rows and weights on through shared memory, without a barrier of the block. A corner
// without a tile is not read. The gradient of the values can be summed in 64-bit fixed point, where order does not matter.
#pragma once
#include "cuda_lanes.cuh"
#include "launch.h"

namespace deform_attn {
namespace {

// What the gradients of a point need beside rows and weights: 1 / n and A / n of ../cpu/kernel.h.
template <class Real>
struct Place {
  Real lx, ly, inverse, scale;
};

// The bag of a query, among those of the launch.
__device__ inline int bag_of(const Bags& bags, int64_t query) {
  int low = 0, high = bags.count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (query < bags.end[middle]) high = middle;
    else low = middle + 1;
  }
  return low;
}

// Point p of a (query, head): where its corners' values are, and their weights.
template <class S, class Real>
__device__ inline Place<Real> place_point(const CudaCall<S, Real>& call, int bag, int64_t group, int p, Point<Real>& point) {
  int level = 0;
  while (level + 1 < call.bags.levels && p >= call.bags.point_end[level]) ++level;
  const int map = bag * call.bags.levels + level, width = call.bags.width[map], height = call.bags.height[map];
  const Real* location = call.locations + (group * call.points + p) * 2;
  const Real x = __ldcs(location), y = __ldcs(location + 1), attention = __ldcs(call.weights + group * call.points + p);
  const bool near = x > Real(-1) && x < Real(width) && y > Real(-1) && y < Real(height);  // false for NaN too
  const Real safe_x = near ? x : Real(0), safe_y = near ? y : Real(0);
  const Real floor_x = floor(safe_x), floor_y = floor(safe_y);
  const int x0 = int(floor_x), y0 = int(floor_y);
  Place<Real> at;
  at.lx = safe_x - floor_x;
  at.ly = safe_y - floor_y;
  const bool left = near && x0 >= 0, right = near && x0 + 1 < width, top = y0 >= 0, bottom = y0 + 1 < height;
  const bool inside[4] = {top && left, top && right, bottom && left, bottom && right};
  const int32_t* cell = call.maps + (int64_t(call.bags.start[map]) + int64_t(y0) * width + x0);
  const Real products[4] = {(1 - at.ly) * (1 - at.lx), (1 - at.ly) * at.lx, at.ly * (1 - at.lx), at.ly * at.lx};
  Real sum = 0;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int row = inside[c] ? cell[int64_t(c / 2) * width + c % 2] : -1;
    point.row[c] = row < call.rows ? row : -1;  // a map that is wrong must not read beyond the values
    point.weight[c] = point.row[c] >= 0 ? products[c] : Real(0);
    sum += point.weight[c];
  }
  at.inverse = !call.renormalise ? Real(1) : sum > 0 ? 1 / sum : Real(0);
  const Real nan_or_zero = (x - x) + (y - y);  // a location that is not finite gives NaN
  at.scale = attention * at.inverse + nan_or_zero;
#pragma unroll
  for (int c = 0; c < 4; ++c) point.weight[c] *= attention * at.inverse;
  point.weight[0] += nan_or_zero;
  return at;
}

template <class S, class Real, int kLanes, int kItems>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ CudaCall<S, Real> call) {
  constexpr int kBlock = points_at_once(kLanes);
  __shared__ Point<Real> table[kThreads / kLanes][kBlock + 1];  // + 1: the groups of a warp read other banks
  const Group<kLanes> group;
  const int64_t index = call.bags.first_query * call.heads + group.index, query = index / call.heads;
  if (query >= call.bags.end[call.bags.count - 1]) return;
  Point<Real>* points = table[group.slot];
  const int bag = bag_of(call.bags, query);
  const S* value = call.value + (index % call.heads) * call.dim;
  for (int channel = group.lane * kItems; channel - group.lane * kItems < call.dim; channel += kLanes * kItems) {
    Real sum[kItems] = {};
    for (int first = 0; first < call.points; first += kBlock) {
      const int count = min(kBlock, call.points - first);
      __syncwarp(group.mask);  // the table has been read
      for (int p = group.lane; p < count; p += kLanes) place_point(call, bag, index, first + p, points[p]);
      __syncwarp(group.mask);
      if (channel >= call.dim) continue;
#pragma unroll 4
      for (int p = 0; p < count; ++p) {
        const Point<Real> point = points[p];
        Chunk<S, kItems> rows[4];
        load_corners(value + channel, point, call.row_bytes, rows);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          Real x[kItems];
          widen(rows[c], x);
#pragma unroll
          for (int i = 0; i < kItems; ++i) sum[i] += point.weight[c] * x[i];
        }
      }
    }
    if (channel >= call.dim) continue;
    Chunk<S, kItems> result;
#pragma unroll
    for (int i = 0; i < kItems; ++i) narrow(sum[i], &result.item[i]);
    *reinterpret_cast<Chunk<S, kItems>*>(call.out + index * call.dim + channel) = result;
  }
}

// Gradients of one point's location and weight from the dots of its corners' values with the gradient of the result.
template <class S, class Real>
__device__ inline void finish_point(const CudaCall<S, Real>& call, const Point<Real>& point, const Place<Real>& at,
                                    const Real (&s)[4], int64_t to) {
  const Real sum = (1 - at.ly) * ((1 - at.lx) * s[0] + at.lx * s[1]) + at.ly * ((1 - at.lx) * s[2] + at.lx * s[3]);
  const Real mean = sum * at.inverse, less = call.renormalise ? mean : Real(0);
  Real t[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) t[c] = s[c] - (point.row[c] >= 0 ? less : Real(0));
  call.grad_locations[2 * to] = at.scale * ((1 - at.ly) * (t[1] - t[0]) + at.ly * (t[3] - t[2]));
  call.grad_locations[2 * to + 1] = at.scale * ((1 - at.lx) * (t[2] - t[0]) + at.lx * (t[3] - t[1]));
  call.grad_weights[to] = mean;
}

template <class S, class Real, int kLanes, int kItems>
__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ CudaCall<S, Real> call) {
  constexpr int kBlock = points_at_once(kLanes);
  __shared__ Point<Real> table[kThreads / kLanes][kBlock + 1];  // + 1: the groups of a warp read other banks
  __shared__ Real dots[kThreads / kLanes][kBlock][4];
  const Group<kLanes> group;
  const int64_t index = call.bags.first_query * call.heads + group.index, query = index / call.heads;
  if (query >= call.bags.end[call.bags.count - 1]) return;
  Point<Real>* points = table[group.slot];
  const int bag = bag_of(call.bags, query);
  const int64_t base = (index % call.heads) * call.dim;
  const uint32_t grad_row_bytes = call.row_bytes / sizeof(S) * sizeof(Real);
  const uint32_t fixed_row_bytes = call.row_bytes / sizeof(S) * sizeof(*call.fixed);
  const S* grad_out = call.grad_out + index * call.dim;
  const double scale = call.fixed != nullptr ? fixed_scale(call.bound, call.headroom) : 0.0;
  for (int first = 0; first < call.points; first += kBlock) {
    const int count = min(kBlock, call.points - first);
    Place<Real> places[(kBlock + kLanes - 1) / kLanes];
    __syncwarp(group.mask);  // the table has been read
#pragma unroll
    for (int k = 0; k < (kBlock + kLanes - 1) / kLanes; ++k)
      if (const int p = group.lane + k * kLanes; p < count)
        places[k] = place_point(call, bag, index, first + p, points[p]);
    __syncwarp(group.mask);
    for (int p = 0; p < count; ++p) {
      const Point<Real> point = points[p];
      Real s[4] = {};
      for (int channel = group.lane * kItems; channel < call.dim; channel += kLanes * kItems) {
        Real g[kItems];
        widen(*reinterpret_cast<const Chunk<S, kItems>*>(grad_out + channel), g);
        Chunk<S, kItems> rows[4];
        load_corners(call.value + base + channel, point, call.row_bytes, rows);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          Real x[kItems];
          widen(rows[c], x);
#pragma unroll
          for (int i = 0; i < kItems; ++i) s[c] += g[i] * x[i];
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (point.row[c] < 0) continue;
          Real scaled[kItems];
#pragma unroll
          for (int i = 0; i < kItems; ++i) scaled[i] = point.weight[c] * g[i];
          const int64_t at = base + channel;
          if (call.fixed != nullptr) add_fixed(row_at(call.fixed + at, point.row[c], fixed_row_bytes), scaled, scale);
          else add(row_at(call.grad_value + at, point.row[c], grad_row_bytes), scaled);
        }
      }
      sum_lanes<Real, kLanes>(s, group.mask);
      if (group.lane == 0)
#pragma unroll
        for (int c = 0; c < 4; ++c) dots[group.slot][p][c] = s[c];
    }
    __syncwarp(group.mask);
#pragma unroll
    for (int k = 0; k < (kBlock + kLanes - 1) / kLanes; ++k)
      if (const int p = group.lane + k * kLanes; p < count)
        finish_point(call, points[p], places[k], dots[group.slot][p], index * call.points + first + p);
  }
}

template <class S, class Real, int kLanes, int kItems>
cudaError_t launch(const CudaCall<S, Real>& call, bool backward, cudaStream_t stream) {
  const int64_t groups = (call.bags.end[call.bags.count - 1] - call.bags.first_query) * call.heads;
  const int64_t per_block = kThreads / kLanes, blocks = (groups + per_block - 1) / per_block;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (backward) backward_kernel<S, Real, kLanes, kItems><<<unsigned(blocks), kThreads, 0, stream>>>(call);
  else forward_kernel<S, Real, kLanes, kItems><<<unsigned(blocks), kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

template <class S, class Real>
cudaError_t launch_any(CudaCall<S, Real> call, bool backward, cudaStream_t stream) {
  return with_chunks<S>(call, [&](auto lanes, auto items) {
    return launch<S, Real, decltype(lanes)::value, decltype(items)::value>(call, backward, stream);
  });
}

}  // namespace

template <class S, class Real>
cudaError_t launch_forward(const CudaCall<S, Real>& call, cudaStream_t stream) {
  return launch_any(call, false, stream);
}

template <class S, class Real>
cudaError_t launch_backward(const CudaCall<S, Real>& call, cudaStream_t stream) {
  return launch_any(call, true, stream);
}

template <class S, class Real>
cudaError_t launch_from_fixed(const CudaCall<S, Real>& call, cudaStream_t stream) {
  return sum_up_fixed(call, call.rows * call.heads * call.dim, stream);
}

}  // namespace deform_attn
