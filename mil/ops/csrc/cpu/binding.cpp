// Schema of the operators and their CPU implementation.
#include "cpu_memory.h"
#include "layout.h"

namespace deform_attn {
namespace {

Call make_call(const Problem& p, const Tensor& value, const Tensor& maps, const Tensor& locations, const Tensor& weights,
               bool renormalise) {
  Call call{};
  call.storage = storage_of(value);
  call.renormalise = renormalise;
  call.rows = p.rows, call.heads = p.heads, call.dim = p.dim;
  call.queries = p.queries, call.points = p.points, call.bags = p.bags;
  call.maps = static_cast<const int32_t*>(maps.const_data_ptr());
  call.bag_end = p.bag_end.data();
  call.value = value.const_data_ptr();
  call.locations = locations.const_data_ptr();
  call.weights = weights.const_data_ptr();
  return call;
}

Tensor forward(const Tensor& value_in, const Tensor& maps_in, const Tensor& shapes, const Tensor& bags,
               std::vector<int64_t> points, const Tensor& locations_in, const Tensor& weights_in, bool renormalise) {
  const Tensor value = torch::stable::contiguous(value_in), maps = torch::stable::contiguous(maps_in),
               locations = torch::stable::contiguous(locations_in), weights = torch::stable::contiguous(weights_in);
  const Problem p = check_problem(value, maps, shapes, bags, points, locations, weights);
  const std::vector<int64_t> out_sizes{p.queries, p.heads * p.dim};
  Tensor out = torch::stable::new_empty(value, out_sizes);
  if (out.numel() == 0) return out;
  Call call = make_call(p, value, maps, locations, weights, renormalise);
  range_of(call.maps, 0, maps.numel(), p.rows);
  const PointTables tables(p);
  call.points_of = tables.views.data();
  call.out = large_pages(out);
  constexpr int64_t kGrain = 32;
  const Kernels& chosen = kernels();
  torch::stable::parallel_for(0, p.queries, kGrain, [&](int64_t begin, int64_t end) { chosen.forward(call, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_in, const Tensor& value_in, const Tensor& maps_in,
                                            const Tensor& shapes, const Tensor& bags, std::vector<int64_t> points,
                                            const Tensor& locations_in, const Tensor& weights_in, bool renormalise,
                                            std::optional<Tensor> /*bound: sums are deterministic without*/) {
  const Tensor value = torch::stable::contiguous(value_in), maps = torch::stable::contiguous(maps_in),
               locations = torch::stable::contiguous(locations_in), weights = torch::stable::contiguous(weights_in),
               grad = torch::stable::contiguous(grad_in);
  const Problem p = check_problem(value, maps, shapes, bags, points, locations, weights);
  check_like(grad, "grad_out", {p.queries, p.heads * p.dim}, value.scalar_type(), value);
  const std::vector<int64_t> value_sizes{p.rows, p.heads, p.dim};
  Tensor grad_value = torch::stable::new_empty(value, value_sizes, compute_type(value));
  Tensor grad_locations = torch::stable::empty_like(locations), grad_weights = torch::stable::empty_like(weights);
  if (grad.numel() == 0) {  // no query or no channel reads anything
    torch::stable::zero_(grad_value), torch::stable::zero_(grad_locations), torch::stable::zero_(grad_weights);
    return {grad_value, grad_locations, grad_weights};
  }
  Call call = make_call(p, value, maps, locations, weights, renormalise);
  const Sections sections(p, call.maps);
  call.sections = sections.sections.data();
  call.sections_maps = sections.maps.data();
  call.grad_out = grad.const_data_ptr();
  call.grad_value = large_pages(grad_value);
  call.grad_locations = large_pages(grad_locations);
  call.grad_weights = large_pages(grad_weights);
  if (!sections.cover(p.rows)) zero(call.grad_value, grad_value.numel() * (compute_type(value) == ScalarType::Double ? 8 : 4));
  const int64_t items = static_cast<int64_t>(sections.sections.size()) * p.heads;
  const Kernels& chosen = kernels();
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) { chosen.backward(call, begin, end); });
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY(mil, library) {
  library.def(
      "sparse_deform_attn(Tensor value, Tensor maps, Tensor shapes, Tensor bags, int[] points, Tensor locations, "
      "Tensor weights, bool renormalise) -> Tensor");
  // bound: a scalar that no |gradient of a row by one point| exceeds; where given, sums do not depend on the order of additions
  library.def(
      "sparse_deform_attn_backward(Tensor grad_out, Tensor value, Tensor maps, Tensor shapes, Tensor bags, int[] points, "
      "Tensor locations, Tensor weights, bool renormalise, Tensor? bound) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(mil, CPU, library) {
  library.impl("sparse_deform_attn", TORCH_BOX(&forward));
  library.impl("sparse_deform_attn_backward", TORCH_BOX(&backward));
}

}  // namespace deform_attn
