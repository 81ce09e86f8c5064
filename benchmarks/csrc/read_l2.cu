// Reads a buffer again and again past the first-level cache: what the second-level cache delivers when the buffer fits it.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

// No load depends on another one; the impossible store keeps them from being removed.
__global__ void read_kernel(const float4* buffer, int64_t chunks, int times, float* sink) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  float sum = 0;
  for (int time = 0; time < times; ++time) {
#pragma unroll 4
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < chunks; i += step) {
      const float4 chunk = __ldcg(buffer + i);
      sum += chunk.x + chunk.y + chunk.z + chunk.w;
    }
  }
  if (sum == -1.f) *sink = sum;
}

}  // namespace

// Reads `chunks` x 16 bytes `times` times with `blocks` x 1024 threads; the buffer holds zeros.
extern "C" __attribute__((visibility("default"))) cudaError_t read_l2(const float4* buffer, int64_t chunks, int times,
                                                                      int blocks, float* sink, cudaStream_t stream) {
  read_kernel<<<blocks, 1024, 0, stream>>>(buffer, chunks, times, sink);
  return cudaGetLastError();
}
