// CUDA implementation of the operators: device, stream and errors around the kernels.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../problem.h"
#include "launch.h"

namespace deform_attn {
namespace {

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, "ms_deform_attn: ", what, ": ", cudaGetErrorString(status),
                  "; was the CUDA unit built for this device? (bash tools/build_ops.sh)");
}

Levels levels_of(const Problem& p) {
  STD_TORCH_CHECK(p.points_per_level.size() <= kMaxLevels, "ms_deform_attn: expected at most ", kMaxLevels, " levels on CUDA");
  Levels levels{};
  levels.count = static_cast<int>(p.points_per_level.size());
  int64_t cells = 0, points = 0;
  for (int i = 0; i < levels.count; ++i) {
    levels.height[i] = static_cast<int>(p.shapes[2 * i]);
    levels.width[i] = static_cast<int>(p.shapes[2 * i + 1]);
    levels.start[i] = static_cast<int>(cells);
    cells += p.shapes[2 * i] * p.shapes[2 * i + 1];
    points += p.points_per_level[i];
    levels.point_end[i] = static_cast<int>(points);
  }
  return levels;
}

template <class S, class Real>
CudaCall<S, Real> call_of(const Problem& p, const Tensor& value, const Tensor& locations, const Tensor& weights) {
  CudaCall<S, Real> call{};
  call.batch = p.batch, call.cells = p.cells, call.queries = p.queries;
  call.heads = static_cast<int>(p.heads), call.dim = static_cast<int>(p.dim), call.points = static_cast<int>(p.points);
  call.levels = levels_of(p);
  call.value = static_cast<const S*>(value.const_data_ptr());
  call.locations = static_cast<const Real*>(locations.const_data_ptr());
  call.weights = static_cast<const Real*>(weights.const_data_ptr());
  return call;
}

// f(storage, computation) for the dtype of the values.
template <class F>
void by_type(const Tensor& value, F&& f) {
  switch (value.scalar_type()) {
    case ScalarType::Double: return f(double{}, double{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{}, float{});
    case ScalarType::Half: return f(__half{}, float{});
    default: return f(float{}, float{});
  }
}

Tensor forward(const Tensor& value_in, std::vector<int64_t> shapes, std::vector<int64_t> points, const Tensor& locations_in,
               const Tensor& weights_in) {
  const torch::stable::accelerator::DeviceGuard guard(value_in.get_device_index());
  const Tensor value = torch::stable::contiguous(value_in), locations = torch::stable::contiguous(locations_in),
               weights = torch::stable::contiguous(weights_in);
  const Problem p = check_problem(value, shapes, points, locations, weights);
  const std::vector<int64_t> out_sizes{p.batch, p.queries, p.heads * p.dim};
  Tensor out = torch::stable::new_empty(value, out_sizes);
  if (out.numel() == 0) return out;
  by_type(value, [&](auto storage, auto real) {
    using S = decltype(storage);
    auto call = call_of<S, decltype(real)>(p, value, locations, weights);
    call.out = static_cast<S*>(out.mutable_data_ptr());
    check(launch_forward(call, current_stream(value)), "forward");
  });
  return out;
}

// Bits that a contribution of the largest size may have, so that as many as a cell can receive never overflow 63 bits.
int headroom(const Problem& p) {
  int bits = 0;
  while ((int64_t{1} << bits) <= p.queries * p.points) ++bits;
  return 62 - bits;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_in, const Tensor& value_in, std::vector<int64_t> shapes,
                                            std::vector<int64_t> points, const Tensor& locations_in, const Tensor& weights_in,
                                            std::optional<Tensor> bound) {
  const torch::stable::accelerator::DeviceGuard guard(value_in.get_device_index());
  const Tensor value = torch::stable::contiguous(value_in), locations = torch::stable::contiguous(locations_in),
               weights = torch::stable::contiguous(weights_in), grad = torch::stable::contiguous(grad_in);
  const Problem p = check_problem(value, shapes, points, locations, weights);
  check_like(grad, "grad_out", {p.batch, p.queries, p.heads * p.dim}, value.scalar_type(), value);
  const std::vector<int64_t> value_sizes{p.batch, p.cells, p.heads, p.dim};
  Tensor grad_value = torch::stable::new_zeros(value, value_sizes, compute_type(value));
  Tensor grad_locations = torch::stable::empty_like(locations), grad_weights = torch::stable::empty_like(weights);
  if (grad.numel() == 0) {  // no query or no channel reads anything
    torch::stable::zero_(grad_locations), torch::stable::zero_(grad_weights);
    return {grad_value, grad_locations, grad_weights};
  }
  by_type(value, [&](auto storage, auto real) {
    using S = decltype(storage);
    using Real = decltype(real);
    auto call = call_of<S, Real>(p, value, locations, weights);
    call.grad_out = static_cast<const S*>(grad.const_data_ptr());
    call.grad_value = static_cast<Real*>(grad_value.mutable_data_ptr());
    call.grad_locations = static_cast<Real*>(grad_locations.mutable_data_ptr());
    call.grad_weights = static_cast<Real*>(grad_weights.mutable_data_ptr());
    Tensor fixed = grad_value;
    if (bound.has_value()) {
      check_like(*bound, "bound", {}, compute_type(value), value);
      fixed = torch::stable::new_zeros(value, value_sizes, ScalarType::Long);
      call.fixed = static_cast<unsigned long long*>(fixed.mutable_data_ptr());
      call.bound = static_cast<const Real*>(bound->const_data_ptr());
      call.headroom = headroom(p);
    }
    check(launch_backward(call, current_stream(value)), "backward");
  });
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(detection_kd, CUDA, library) {
  library.impl("ms_deform_attn", TORCH_BOX(&forward));
  library.impl("ms_deform_attn_backward", TORCH_BOX(&backward));
}

}  // namespace deform_attn
