// Runs CUDA kernels on the host, so that their index arithmetic and their synchronisation are tested without a GPU.
//
// Every thread of a block is a fiber that runs until its next barrier; after each barrier the fibers take turns in another
// order. A barrier that a thread of its mask never reaches is reported as a deadlock, and what a missing barrier would order
// comes out wrong. Blocks run one after the other. Only what the kernels here use is there.
#pragma once
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <random>
#include <vector>

#define __CUDA_ARCH__ 900
#define __device__
#define __global__
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(threads)

using std::min;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
using cudaStream_t = void*;
inline cudaError_t last_error;
inline cudaError_t cudaGetLastError() { return last_error; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid"; }

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct __nv_bfloat16 {
  uint16_t bits;
};
using __half = _Float16;
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float result;
  memcpy(&result, &bits, 4);
  return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return __half(x); }
inline float __uint_as_float(uint32_t bits) {
  float result;
  memcpy(&result, &bits, 4);
  return result;
}
template <class T>
T __ldcs(const T* from) { return *from; }
template <class T>
T __ldcg(const T* from) { return *from; }
template <class T>
void atomicAdd(T* to, T x) { *to += x; }
inline void atomicAdd(float4* to, float4 x) { to->x += x.x, to->y += x.y, to->z += x.z, to->w += x.w; }

namespace on_host {

constexpr size_t kStack = 1 << 16;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  bool waits, done;
  uint64_t barrier;  // mask of the lanes of its warp; all ones: the block
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current;
inline const std::function<void()>* body;
inline uint64_t slots[1024];
constexpr uint64_t kBlock = ~uint64_t(0);

inline void fail(const char* what) {
  fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, current, what);
  abort();
}

inline void enter() {
  (*body)();
  fibers[current].done = true;
}

// The calling fiber waits until every lane of `mask` in its warp does, or every living thread of the block.
inline void wait(uint64_t mask) {
  const unsigned first = mask == kBlock ? 0 : current / 32 * 32, count = mask == kBlock ? blockDim.x : 32;
  if (mask != kBlock && !(mask >> current % 32 & 1)) fail("a barrier without the thread itself in its mask");
  fibers[current].waits = true, fibers[current].barrier = mask;
  const auto belongs = [&](unsigned i) { return mask == kBlock ? !fibers[first + i].done : mask >> i & 1; };
  bool all = true;
  for (unsigned i = 0; i < count; ++i)
    if (belongs(i)) all = all && fibers[first + i].waits && fibers[first + i].barrier == mask;
  if (all)
    for (unsigned i = 0; i < count; ++i)
      if (belongs(i)) fibers[first + i].waits = false;
  swapcontext(&fibers[current].context, &scheduler);
  threadIdx.x = current;
}

inline void run_block(std::mt19937& order) {
  std::vector<unsigned> turns(blockDim.x);
  for (unsigned i = 0; i < blockDim.x; ++i) {
    turns[i] = i;
    Fiber& fiber = fibers[i];
    fiber.waits = fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned left = blockDim.x; left > 0;) {
    std::shuffle(turns.begin(), turns.end(), order);
    bool moved = false;
    for (const unsigned i : turns) {
      if (fibers[i].done || fibers[i].waits) continue;
      current = threadIdx.x = i, moved = true;
      swapcontext(&scheduler, &fibers[i].context);
      left -= fibers[i].done;
    }
    if (!moved) fail("deadlock");
  }
}

inline void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  last_error = blocks == 0 ? cudaErrorInvalidConfiguration : cudaSuccess;
  std::mt19937 order(0);
  if (fibers.size() < threads) fibers.resize(threads);
  body = &kernel, gridDim.x = blocks, blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(order);
}

}  // namespace on_host

inline void __syncthreads() { on_host::wait(on_host::kBlock); }
inline void __syncwarp(unsigned mask) { on_host::wait(mask); }

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int offset) {
  memcpy(&on_host::slots[threadIdx.x], &x, sizeof(T));
  on_host::wait(mask);
  T other;
  memcpy(&other, &on_host::slots[threadIdx.x ^ unsigned(offset)], sizeof(T));
  on_host::wait(mask);
  return other;
}
