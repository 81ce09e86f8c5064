// CUDA implementation of the operators: device, stream and errors around the kernels.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

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
  STD_TORCH_CHECK(status == cudaSuccess, "sparse_deform_attn: ", what, ": ", cudaGetErrorString(status),
                  "; was the CUDA unit built for this device? (bash tools/build_ops.sh)");
}

// f(bags of one launch), over all bags that have queries; cells count from the first map of all.
template <class F>
void over_bags(const Problem& p, F&& f) {
  STD_TORCH_CHECK(p.levels <= kMaxLevels, "sparse_deform_attn: expected at most ", kMaxLevels, " levels on CUDA");
  const int64_t at_once = p.levels == 0 ? kMaxMaps : kMaxMaps / p.levels;
  int64_t start = 0;
  for (int64_t first = 0; first < p.bags; first += at_once) {
    Bags bags{};
    bags.count = static_cast<int>(std::min(at_once, p.bags - first));
    bags.levels = static_cast<int>(p.levels);
    bags.first_query = first == 0 ? 0 : p.bag_end[static_cast<size_t>(first - 1)];
    std::copy_n(p.bag_end.begin() + first, bags.count, bags.end);
    for (int map = 0; map < bags.count * bags.levels; ++map) {
      const int64_t* size = p.shapes + 2 * (first * p.levels + map);
      bags.height[map] = static_cast<int>(size[0]), bags.width[map] = static_cast<int>(size[1]);
      bags.start[map] = static_cast<int>(start);
      start += size[0] * size[1];
    }
    int64_t points = 0;
    for (int level = 0; level < bags.levels; ++level)
      bags.point_end[level] = static_cast<int>(points += p.points_per_level[static_cast<size_t>(level)]);
    if (bags.end[bags.count - 1] > bags.first_query) f(bags);
  }
}

template <class S, class Real>
CudaCall<S, Real> call_of(const Problem& p, const Tensor& value, const Tensor& maps, const Tensor& locations,
                          const Tensor& weights, bool renormalise) {
  CudaCall<S, Real> call{};
  call.rows = p.rows;
  call.heads = static_cast<int>(p.heads), call.dim = static_cast<int>(p.dim), call.points = static_cast<int>(p.points);
  call.renormalise = renormalise;
  call.maps = static_cast<const int32_t*>(maps.const_data_ptr());
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

Tensor forward(const Tensor& value_in, const Tensor& maps_in, const Tensor& shapes, const Tensor& bags,
               std::vector<int64_t> points, const Tensor& locations_in, const Tensor& weights_in, bool renormalise) {
  const torch::stable::accelerator::DeviceGuard guard(value_in.get_device_index());
  const Tensor value = torch::stable::contiguous(value_in), maps = torch::stable::contiguous(maps_in),
               locations = torch::stable::contiguous(locations_in), weights = torch::stable::contiguous(weights_in);
  const Problem p = check_problem(value, maps, shapes, bags, points, locations, weights);
  const std::vector<int64_t> out_sizes{p.queries, p.heads * p.dim};
  Tensor out = torch::stable::new_empty(value, out_sizes);
  if (out.numel() == 0) return out;
  by_type(value, [&](auto storage, auto real) {
    using S = decltype(storage);
    auto call = call_of<S, decltype(real)>(p, value, maps, locations, weights, renormalise);
    call.out = static_cast<S*>(out.mutable_data_ptr());
    over_bags(p, [&](const Bags& some) {
      call.bags = some;
      check(launch_forward(call, current_stream(value)), "forward");
    });
  });
  return out;
}

// Bits that a contribution of the largest size may have, so that as many as a row can receive never overflow 63 bits.
int headroom(const Problem& p) {
  int bits = 0;
  while ((int64_t{1} << bits) <= p.queries * p.points) ++bits;
  return 62 - bits;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_in, const Tensor& value_in, const Tensor& maps_in,
                                            const Tensor& shapes, const Tensor& bags, std::vector<int64_t> points,
                                            const Tensor& locations_in, const Tensor& weights_in, bool renormalise,
                                            std::optional<Tensor> bound) {
  const torch::stable::accelerator::DeviceGuard guard(value_in.get_device_index());
  const Tensor value = torch::stable::contiguous(value_in), maps = torch::stable::contiguous(maps_in),
               locations = torch::stable::contiguous(locations_in), weights = torch::stable::contiguous(weights_in),
               grad = torch::stable::contiguous(grad_in);
  const Problem p = check_problem(value, maps, shapes, bags, points, locations, weights);
  check_like(grad, "grad_out", {p.queries, p.heads * p.dim}, value.scalar_type(), value);
  const std::vector<int64_t> value_sizes{p.rows, p.heads, p.dim};
  Tensor grad_value = torch::stable::new_zeros(value, value_sizes, compute_type(value));
  Tensor grad_locations = torch::stable::empty_like(locations), grad_weights = torch::stable::empty_like(weights);
  if (grad.numel() == 0) {  // no query or no channel reads anything
    torch::stable::zero_(grad_locations), torch::stable::zero_(grad_weights);
    return {grad_value, grad_locations, grad_weights};
  }
  by_type(value, [&](auto storage, auto real) {
    using S = decltype(storage);
    using Real = decltype(real);
    auto call = call_of<S, Real>(p, value, maps, locations, weights, renormalise);
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
    over_bags(p, [&](const Bags& some) {
      call.bags = some;
      check(launch_backward(call, current_stream(value)), "backward");
    });
    if (call.fixed != nullptr && grad_value.numel() > 0)
      check(launch_from_fixed(call, current_stream(value)), "backward");
  });
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mil, CUDA, library) {
  library.impl("sparse_deform_attn", TORCH_BOX(&forward));
  library.impl("sparse_deform_attn_backward", TORCH_BOX(&backward));
}

}  // namespace deform_attn
