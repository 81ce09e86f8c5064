// Multi-scale deformable attention in the classic design, float32: the baseline that the benchmark measures against.
//
// Source: the design of the CUDA kernels that Deformable DETR (Zhu et al., ICLR 2021) was published with, written anew from its
// description:
// - forward: one thread an output channel, 1024 threads a block; every thread repeats location, floor, weights and addresses;
// - backward: one block of `dim` threads a (sample, query, head); per point, partial sums over channels go to shared memory and
//   thread 0 adds them up between two barriers; the gradient of the values is one scalar atomicAdd a channel and corner;
// - 32-bit indices, scalar loads, shapes and starts of the levels read from device memory.
// Differences: one launch for the whole batch (there: batches of 64), a plain C interface, `dim` = 32 only in the backward.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kForwardThreads = 1024, kDim = 32;

// All tensors contiguous; the same number of points on every level.
struct Call {
  const float* value;       // (batch, cells, heads, dim)
  const int64_t* shapes;    // (levels, 2) height, width
  const int64_t* starts;    // (levels) first cell
  const float* locations;   // (batch, queries, heads, levels, points, 2)
  const float* attention;   // (batch, queries, heads, levels, points)
  int batch, cells, heads, dim, levels, queries, points;
};

// The four corners of a location: where they are, which of them are inside, what is left and above of the location.
struct Corners {
  int at[4];  // 00, 01, 10, 11 (y, x)
  bool inside[4];
  float lx, ly;
};

__device__ bool near_map(float x, float y, int width, int height) { return y > -1 && x > -1 && y < height && x < width; }

__device__ Corners corners_of(float x, float y, int width, int height, int heads, int dim, int head, int channel) {
  const int x0 = floorf(x), y0 = floorf(y), x1 = x0 + 1, y1 = y0 + 1;
  const int step = heads * dim, line = width * step, base = head * dim + channel;
  const int top = y0 * line, bottom = top + line, left = x0 * step, right = left + step;
  Corners c;
  c.lx = x - x0, c.ly = y - y0;
  c.at[0] = top + left + base, c.inside[0] = y0 >= 0 && x0 >= 0;
  c.at[1] = top + right + base, c.inside[1] = y0 >= 0 && x1 < width;
  c.at[2] = bottom + left + base, c.inside[2] = y1 < height && x0 >= 0;
  c.at[3] = bottom + right + base, c.inside[3] = y1 < height && x1 < width;
  return c;
}

__device__ void load(const float* map, const Corners& c, float (&v)[4]) {
  for (int k = 0; k < 4; ++k) v[k] = c.inside[k] ? map[c.at[k]] : 0.f;
}

__global__ void forward_kernel(int count, Call call, float* out) {
  for (int index = blockIdx.x * blockDim.x + threadIdx.x; index < count; index += blockDim.x * gridDim.x) {
    const int channel = index % call.dim, group = index / call.dim, head = group % call.heads;
    const int sample = group / call.heads / call.queries;
    int point = group * call.levels * call.points;
    const float* value = call.value + sample * call.cells * call.heads * call.dim;
    float sum = 0;
    for (int level = 0; level < call.levels; ++level) {
      const int height = call.shapes[2 * level], width = call.shapes[2 * level + 1];
      const float* map = value + static_cast<int>(call.starts[level]) * call.heads * call.dim;
      for (int p = 0; p < call.points; ++p, ++point) {
        const float x = call.locations[2 * point] * width - 0.5f, y = call.locations[2 * point + 1] * height - 0.5f;
        if (!near_map(x, y, width, height)) continue;
        const Corners c = corners_of(x, y, width, height, call.heads, call.dim, head, channel);
        const float hx = 1 - c.lx, hy = 1 - c.ly;
        float v[4];
        load(map, c, v);
        const float sampled = hy * hx * v[0] + hy * c.lx * v[1] + c.ly * hx * v[2] + c.ly * c.lx * v[3];
        sum += sampled * call.attention[point];
      }
    }
    out[index] = sum;
  }
}

// One block of kDim threads a (sample, query, head).
__global__ void backward_kernel(Call call, const float* grad_out, float* grad_value, float* grad_locations,
                                float* grad_attention) {
  __shared__ float partial_x[kDim], partial_y[kDim], partial_attention[kDim];
  const int channel = threadIdx.x, group = blockIdx.x, head = group % call.heads;
  const int sample = group / call.heads / call.queries, first = sample * call.cells * call.heads * call.dim;
  const float top = grad_out[group * call.dim + channel];
  int point = group * call.levels * call.points;
  for (int level = 0; level < call.levels; ++level) {
    const int height = call.shapes[2 * level], width = call.shapes[2 * level + 1];
    const int map = first + static_cast<int>(call.starts[level]) * call.heads * call.dim;
    for (int p = 0; p < call.points; ++p, ++point) {
      const float x = call.locations[2 * point] * width - 0.5f, y = call.locations[2 * point + 1] * height - 0.5f;
      const float attention = call.attention[point], scaled = top * attention;
      partial_x[channel] = partial_y[channel] = partial_attention[channel] = 0;
      if (near_map(x, y, width, height)) {
        const Corners c = corners_of(x, y, width, height, call.heads, call.dim, head, channel);
        const float hx = 1 - c.lx, hy = 1 - c.ly, weight[4] = {hy * hx, hy * c.lx, c.ly * hx, c.ly * c.lx};
        float v[4];
        load(call.value + map, c, v);
        for (int k = 0; k < 4; ++k)
          if (c.inside[k]) atomicAdd(grad_value + map + c.at[k], weight[k] * scaled);
        const float sampled = weight[0] * v[0] + weight[1] * v[1] + weight[2] * v[2] + weight[3] * v[3];
        partial_attention[channel] = top * sampled;
        partial_x[channel] = width * scaled * (hy * (v[1] - v[0]) + c.ly * (v[3] - v[2]));
        partial_y[channel] = height * scaled * (hx * (v[2] - v[0]) + c.lx * (v[3] - v[1]));
      }
      __syncthreads();
      if (channel == 0) {
        float sum_x = partial_x[0], sum_y = partial_y[0], sum_attention = partial_attention[0];
        for (int k = 1; k < kDim; ++k) {
          sum_x += partial_x[k];
          sum_y += partial_y[k];
          sum_attention += partial_attention[k];
        }
        grad_locations[2 * point] = sum_x;
        grad_locations[2 * point + 1] = sum_y;
        grad_attention[point] = sum_attention;
      }
      __syncthreads();
    }
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT cudaError_t classic_forward(const Call* call, float* out, cudaStream_t stream) {
  const int count = call->batch * call->queries * call->heads * call->dim;
  forward_kernel<<<(count + kForwardThreads - 1) / kForwardThreads, kForwardThreads, 0, stream>>>(count, *call, out);
  return cudaGetLastError();
}

// `grad_value` holds zeros.
EXPORT cudaError_t classic_backward(const Call* call, const float* grad_out, float* grad_value, float* grad_locations,
                                    float* grad_attention, cudaStream_t stream) {
  if (call->dim != kDim) return cudaErrorInvalidValue;
  backward_kernel<<<call->batch * call->queries * call->heads, kDim, 0, stream>>>(*call, grad_out, grad_value, grad_locations,
                                                                                  grad_attention);
  return cudaGetLastError();
}

EXPORT const char* cuda_error_text(cudaError_t status) { return cudaGetErrorString(status); }
