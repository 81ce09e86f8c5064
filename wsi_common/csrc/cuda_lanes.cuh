// What the kernels of the operators share on CUDA: lanes of a group, chunks of channels, sums that need no order.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace deform_attn {
namespace {

constexpr int kThreads = 128;

// Points that a group works out at a time: fewer where a block has more groups, whose tables share its shared memory.
constexpr int points_at_once(int lanes) { return lanes < 8 ? 2 * lanes : 16; }

template <class S, int N>
struct alignas(sizeof(S) * N) Chunk {
  S item[N];
};

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <class S, class Real, int kItems>
__device__ inline void widen(const Chunk<S, kItems>& from, Real (&to)[kItems]) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) to[i] = widen(from.item[i]);
}
// A bfloat16 is the upper half of a float: one instruction a number, where the two are taken from their 32 bits.
__device__ inline void widen(const Chunk<__nv_bfloat16, 8>& from, float (&to)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    uint32_t two;
    memcpy(&two, &from.item[i], sizeof(two));
    to[i] = __uint_as_float(two << 16);
    to[i + 1] = __uint_as_float(two & 0xffff0000u);
  }
}

// Row `row` of a map whose rows of channels lie `row_bytes` apart: one 32 x 32 + 64 bit multiplication and addition.
template <class T>
__device__ inline const T* row_at(const T* map, int row, uint32_t row_bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(map) + uint64_t(uint32_t(row)) * row_bytes);
}
template <class T>
__device__ inline T* row_at(T* map, int row, uint32_t row_bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(map) + uint64_t(uint32_t(row)) * row_bytes);
}

__device__ inline void narrow(float x, float* out) { *out = x; }
__device__ inline void narrow(double x, double* out) { *out = x; }
__device__ inline void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half* out) { *out = __float2half_rn(x); }

// One point of a (sample, query, head), as its group shares it.
template <class Real>
struct alignas(16) Point {
  int row[4];  // where the values of corner 00, 01, 10, 11 (y, x) are; -1: nowhere
  Real weight[4];
};

// The chunks of a point's four corners, zeros for those that are nowhere; all loads are under way before the first one is used.
template <class S, class Real, int kItems>
__device__ inline void load_corners(const S* value, const Point<Real>& point, uint32_t row_bytes, Chunk<S, kItems> (&rows)[4]) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    rows[c] = {};
    if (point.row[c] >= 0) rows[c] = *reinterpret_cast<const Chunk<S, kItems>*>(row_at(value, point.row[c], row_bytes));
  }
}

// Lanes [0, kLanes) of a group share one result, number `index`; the rest of a warp holds other groups.
template <int kLanes>
struct Group {
  int64_t index;
  int lane, slot;
  unsigned mask;

  __device__ Group()
      : index((int64_t(blockIdx.x) * kThreads + threadIdx.x) / kLanes),
        lane(threadIdx.x % kLanes),
        slot(threadIdx.x / kLanes),
        mask(kLanes == 32 ? 0xffffffffu : ((1u << (kLanes % 32)) - 1) << (threadIdx.x % 32 / kLanes * kLanes)) {}
};

__device__ inline void add(double* to, const double (&x)[2]) {
  atomicAdd(to, x[0]);
  atomicAdd(to + 1, x[1]);
}
template <int kItems>
__device__ inline void add(float* to, const float (&x)[kItems]) {
#if __CUDA_ARCH__ >= 900  // four at once
  constexpr bool kFour = kItems % 4 == 0;
  if constexpr (kFour) {
#pragma unroll
    for (int i = 0; i < kItems; i += 4)
      atomicAdd(reinterpret_cast<float4*>(to + i), make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]));
  }
#else
  constexpr bool kFour = false;
#endif
  if constexpr (!kFour) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) atomicAdd(to + i, x[i]);
  }
}
__device__ inline void add(double* to, const double (&x)[1]) { atomicAdd(to, x[0]); }

// Steps of the fixed-point sums in 1; 0 where the bound is 0 or not finite.
template <class Real>
__device__ inline double fixed_scale(const Real* bound, int headroom) {
  const double largest = double(*bound);
  return largest > 0 && isfinite(largest) ? scalbn(1.0, headroom - 2 - ilogb(largest)) : 0.0;
}

template <class Real, int kItems>
__device__ inline void add_fixed(unsigned long long* to, const Real (&x)[kItems], double scale) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) atomicAdd(to + i, static_cast<unsigned long long>(llrint(double(x[i]) * scale)));
}

// The sums over a group's lanes of four numbers, on every lane.
template <class Real, int kLanes>
__device__ inline void sum_lanes(Real (&s)[4], unsigned mask) {
  if constexpr (kLanes > 1) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
#pragma unroll
      for (int c = 0; c < 4; ++c) s[c] += __shfl_xor_sync(mask, s[c], offset);
  }
}

// grad_value from its fixed-point sums; NaN where the bound was not finite.
template <class Real>
__global__ void from_fixed_kernel(const unsigned long long* fixed, const Real* bound, int headroom, Real* out, int64_t count) {
  const double scale = fixed_scale(bound, headroom), largest = double(*bound);
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step)
    out[i] = scale > 0 ? Real(double(static_cast<long long>(fixed[i])) / scale) : Real(largest - largest);
}

template <class Call>
cudaError_t sum_up_fixed(const Call& call, int64_t count, cudaStream_t stream) {
  const int64_t blocks = (count + 255) / 256;
  const unsigned some = unsigned(blocks < 65535 ? blocks : 65535);
  from_fixed_kernel<<<some, 256, 0, stream>>>(call.fixed, call.bound, call.headroom, call.grad_value, count);
  return cudaGetLastError();
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// f(lanes of a group, channels of a lane): as many lanes as there are chunks of channels, at most a warp.
template <int kItems, class F>
cudaError_t with_lanes(int dim, F&& f) {
  const int chunks = (dim + kItems - 1) / kItems;
  if (chunks <= 1) return f(Constant<1>{}, Constant<kItems>{});
  if (chunks <= 2) return f(Constant<2>{}, Constant<kItems>{});
  if (chunks <= 4) return f(Constant<4>{}, Constant<kItems>{});
  if (chunks <= 8) return f(Constant<8>{}, Constant<kItems>{});
  if (chunks <= 16) return f(Constant<16>{}, Constant<kItems>{});
  return f(Constant<32>{}, Constant<kItems>{});
}

// Sets row_bytes; lanes take 16 bytes of channels where every row begins at a multiple of 16, else one channel.
template <class S, class Call, class F>
cudaError_t with_chunks(Call& call, F&& f) {
  constexpr int kItems = 16 / sizeof(S);
  if (int64_t(call.heads) * call.dim > INT32_MAX / 8) return cudaErrorInvalidConfiguration;  // row_bytes, of 8 a number
  call.row_bytes = uint32_t(call.heads) * call.dim * sizeof(S);
  const auto address = reinterpret_cast<uintptr_t>(call.value) | reinterpret_cast<uintptr_t>(call.out) |
                       reinterpret_cast<uintptr_t>(call.grad_out);  // a view may start anywhere
  if (call.dim % kItems == 0 && address % 16 == 0) return with_lanes<kItems>(call.dim, f);
  return with_lanes<1>(call.dim, f);
}

}  // namespace
}  // namespace deform_attn
