// Forward and backward of multi-scale deformable attention on CUDA; mathematics as in ../cpu/kernel.h.
//
// Source: Deformable DETR (Zhu et al., ICLR 2021, arXiv:2010.04159), equation 3. Differences from the authors' kernels:
// - a group of 1 to 32 lanes shares a (sample, query, head), each lane with 16 bytes of channels; the authors give a thread
//   one channel, so that every thread repeats the whole address arithmetic;
// - the lanes of a group work out different points and pass them on through shared memory, without a barrier of the block;
// - sums over channels are shuffles between the lanes of a group, not shared memory summed by one thread;
// - indices of rows are 64-bit, masked corners are not read, accumulation is float32 for 16-bit values;
// - the gradient of the values can be summed in 64-bit fixed point, where the order of additions does not matter.
#pragma once
#include "cuda_lanes.cuh"
#include "launch.h"

namespace deform_attn {
namespace {

template <class Real>
struct Place {
  Real x, y, lx, ly, attention;
  int width, height;
};

template <class S, class Real>
__device__ inline Place<Real> place_point(const CudaCall<S, Real>& call, int64_t group, int p, Point<Real>& point) {
  int level = 0;
  while (level + 1 < call.levels.count && p >= call.levels.point_end[level]) ++level;
  Place<Real> at;
  at.width = call.levels.width[level];
  at.height = call.levels.height[level];
  const Real* location = call.locations + (group * call.points + p) * 2;
  const Real x = fma(__ldcs(location), Real(at.width), Real(-0.5)), y = fma(__ldcs(location + 1), Real(at.height), Real(-0.5));
  at.attention = __ldcs(call.weights + group * call.points + p);
  const bool near = x > Real(-1) && x < Real(at.width) && y > Real(-1) && y < Real(at.height);  // false for NaN too
  const Real safe_x = near ? x : Real(0), safe_y = near ? y : Real(0);
  const Real floor_x = floor(safe_x), floor_y = floor(safe_y);
  const int x0 = int(floor_x), y0 = int(floor_y);
  at.lx = safe_x - floor_x;
  at.ly = safe_y - floor_y;
  const Real nan_or_zero = (x - x) + (y - y);  // a location that is not finite gives NaN
  at.attention += nan_or_zero;
  const bool left = near && x0 >= 0, right = near && x0 + 1 < at.width, top = y0 >= 0, bottom = y0 + 1 < at.height;
  const int row = call.levels.start[level] + y0 * at.width + x0;
  const Real upper = at.attention * (1 - at.ly), lower = at.attention * at.ly;
  point.row[0] = top && left ? row : -1;
  point.row[1] = top && right ? row + 1 : -1;
  point.row[2] = bottom && left ? row + at.width : -1;
  point.row[3] = bottom && right ? row + at.width + 1 : -1;
  point.weight[0] = top && left ? upper * (1 - at.lx) : nan_or_zero;
  point.weight[1] = top && right ? upper * at.lx : Real(0);
  point.weight[2] = bottom && left ? lower * (1 - at.lx) : Real(0);
  point.weight[3] = bottom && right ? lower * at.lx : Real(0);
  return at;
}

template <class S, class Real, int kLanes, int kItems>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ CudaCall<S, Real> call) {
  constexpr int kBlock = points_at_once(kLanes);
  __shared__ Point<Real> table[kThreads / kLanes][kBlock + 1];  // + 1: the groups of a warp read other banks
  const Group<kLanes> group;
  if (group.index >= call.batch * call.queries * call.heads) return;
  Point<Real>* points = table[group.slot];
  const int head = int(group.index % call.heads);
  const int64_t sample = group.index / call.heads / call.queries, stride = int64_t(call.heads) * call.dim;
  const S* value = call.value + sample * call.cells * stride + int64_t(head) * call.dim;
  for (int channel = group.lane * kItems; channel - group.lane * kItems < call.dim; channel += kLanes * kItems) {
    Real sum[kItems] = {};
    for (int first = 0; first < call.points; first += kBlock) {
      const int count = min(kBlock, call.points - first);
      __syncwarp(group.mask);  // the table has been read
      for (int p = group.lane; p < count; p += kLanes) place_point(call, group.index, first + p, points[p]);
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
    *reinterpret_cast<Chunk<S, kItems>*>(call.out + group.index * call.dim + channel) = result;
  }
}

template <class S, class Real, int kLanes, int kItems>
__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ CudaCall<S, Real> call) {
  constexpr int kBlock = points_at_once(kLanes);
  __shared__ Point<Real> table[kThreads / kLanes][kBlock + 1];  // + 1: the groups of a warp read other banks
  __shared__ Real dots[kThreads / kLanes][kBlock][4];
  const Group<kLanes> group;
  if (group.index >= call.batch * call.queries * call.heads) return;
  Point<Real>* points = table[group.slot];
  const int head = int(group.index % call.heads);
  const int64_t sample = group.index / call.heads / call.queries, stride = int64_t(call.heads) * call.dim;
  const int64_t base = sample * call.cells * stride + int64_t(head) * call.dim;
  const uint32_t grad_row_bytes = call.row_bytes / sizeof(S) * sizeof(Real);
  const uint32_t fixed_row_bytes = call.row_bytes / sizeof(S) * sizeof(*call.fixed);
  const S* grad_out = call.grad_out + group.index * call.dim;
  const bool once = call.dim <= kLanes * kItems;  // a lane has one chunk, which stays in registers
  Real g[kItems] = {};
  if (once && group.lane * kItems < call.dim)
    widen(*reinterpret_cast<const Chunk<S, kItems>*>(grad_out + group.lane * kItems), g);
  const double scale = call.fixed != nullptr ? fixed_scale(call.bound, call.headroom) : 0.0;
  for (int first = 0; first < call.points; first += kBlock) {
    const int count = min(kBlock, call.points - first);
    Place<Real> places[(kBlock + kLanes - 1) / kLanes];
    __syncwarp(group.mask);  // the table has been read
#pragma unroll
    for (int k = 0; k < (kBlock + kLanes - 1) / kLanes; ++k)
      if (const int p = group.lane + k * kLanes; p < count)
        places[k] = place_point(call, group.index, first + p, points[p]);
    __syncwarp(group.mask);
    for (int p = 0; p < count; ++p) {
      const Point<Real> point = points[p];
      Real s[4] = {};
      for (int channel = group.lane * kItems; channel < call.dim; channel += kLanes * kItems) {
        if (!once) widen(*reinterpret_cast<const Chunk<S, kItems>*>(grad_out + channel), g);
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
    for (int k = 0; k < (kBlock + kLanes - 1) / kLanes; ++k) {
      const int p = group.lane + k * kLanes;
      if (p >= count) continue;
      const Place<Real>& at = places[k];
      const Real(&s)[4] = dots[group.slot][p];
      const int64_t to = group.index * call.points + first + p;
      call.grad_locations[2 * to] = at.attention * Real(at.width) * ((1 - at.ly) * (s[1] - s[0]) + at.ly * (s[3] - s[2]));
      call.grad_locations[2 * to + 1] = at.attention * Real(at.height) * ((1 - at.lx) * (s[2] - s[0]) + at.lx * (s[3] - s[1]));
      call.grad_weights[to] = (1 - at.ly) * ((1 - at.lx) * s[0] + at.lx * s[1]) + at.ly * ((1 - at.lx) * s[2] + at.lx * s[3]);
    }
  }
}

template <class S, class Real, int kLanes, int kItems>
cudaError_t launch(const CudaCall<S, Real>& call, bool backward, cudaStream_t stream) {
  const int64_t groups = call.batch * call.queries * call.heads, per_block = kThreads / kLanes;
  const int64_t blocks = (groups + per_block - 1) / per_block;
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
  const cudaError_t status = launch_any(call, true, stream);
  if (status != cudaSuccess || call.fixed == nullptr) return status;
  return sum_up_fixed(call, call.batch * call.cells * call.heads * call.dim, stream);
}

}  // namespace deform_attn
