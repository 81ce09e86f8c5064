// Schema of the operators and their CPU implementation.
#include "../problem.h"
#include "call.h"
#include "cpu_memory.h"

namespace deform_attn {
namespace {

// Level size and start of every point, padded to whole blocks with levels of size 0.
struct PointTable {
  explicit PointTable(const Problem& p) {
    const size_t padded = static_cast<size_t>((p.points + kBlock - 1) / kBlock * kBlock);
    for (std::vector<int32_t>* column : {&width, &height, &start}) column->assign(padded, 0);
    size_t point = 0;
    int64_t cells = 0;
    for (size_t level = 0; level < p.points_per_level.size(); ++level) {
      const int64_t rows = p.shapes[2 * level], columns = p.shapes[2 * level + 1];
      for (int64_t i = 0; i < p.points_per_level[level]; ++i, ++point) {
        height[point] = static_cast<int32_t>(rows);
        width[point] = static_cast<int32_t>(columns);
        start[point] = static_cast<int32_t>(cells);
      }
      cells += rows * columns;
    }
  }

  Points view() const { return {width.data(), height.data(), start.data()}; }

  std::vector<int32_t> width, height, start;
};

Call make_call(const Problem& p, const PointTable& table, const Tensor& value, const Tensor& locations, const Tensor& weights) {
  Call call{};
  call.storage = storage_of(value);
  call.batch = p.batch, call.cells = p.cells, call.heads = p.heads, call.dim = p.dim;
  call.queries = p.queries, call.points = p.points;
  call.table = table.view();
  call.value = value.const_data_ptr();
  call.locations = locations.const_data_ptr();
  call.weights = weights.const_data_ptr();
  return call;
}

// The fewest parts of the queries that give every thread an item.
int64_t query_chunks(const Problem& p) {
  const int64_t threads = torch::stable::get_num_threads(), items = p.batch * p.heads;
  const int64_t wanted = (threads + items - 1) / items;
  return wanted < p.queries ? wanted : p.queries;
}

// Copying pays where a cell is read several times.
bool worth_packing(const Problem& p, int64_t chunks) {
  constexpr int64_t kCorners = 4, kReadsOfACell = 6;
  return p.heads > 1 && p.queries / chunks * p.points * kCorners > kReadsOfACell * p.cells;
}

Tensor forward(const Tensor& value_in, std::vector<int64_t> shapes, std::vector<int64_t> points, const Tensor& locations_in,
               const Tensor& weights_in) {
  const Tensor value = torch::stable::contiguous(value_in), locations = torch::stable::contiguous(locations_in),
               weights = torch::stable::contiguous(weights_in);
  const Problem p = check_problem(value, shapes, points, locations, weights);
  const std::vector<int64_t> out_sizes{p.batch, p.queries, p.heads * p.dim};
  Tensor out = torch::stable::new_empty(value, out_sizes);
  if (out.numel() == 0) return out;
  const PointTable table(p);
  Call call = make_call(p, table, value, locations, weights);
  call.out = large_pages(out);
  call.chunks = query_chunks(p);
  call.pack = worth_packing(p, call.chunks);
  const Kernels& chosen = kernels();
  torch::stable::parallel_for(0, p.batch * p.heads * call.chunks, 1,
                              [&](int64_t begin, int64_t end) { chosen.forward(call, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_in, const Tensor& value_in, std::vector<int64_t> shapes,
                                            std::vector<int64_t> points, const Tensor& locations_in, const Tensor& weights_in,
                                            std::optional<Tensor> /*bound: sums are deterministic without*/) {
  const Tensor value = torch::stable::contiguous(value_in), locations = torch::stable::contiguous(locations_in),
               weights = torch::stable::contiguous(weights_in), grad = torch::stable::contiguous(grad_in);
  const Problem p = check_problem(value, shapes, points, locations, weights);
  check_like(grad, "grad_out", {p.batch, p.queries, p.heads * p.dim}, value.scalar_type(), value);
  const std::vector<int64_t> value_sizes{p.batch, p.cells, p.heads, p.dim};
  Tensor grad_value = torch::stable::new_empty(value, value_sizes, compute_type(value));
  Tensor grad_locations = torch::stable::empty_like(locations), grad_weights = torch::stable::empty_like(weights);
  if (grad.numel() == 0) {  // no query or no channel reads anything
    torch::stable::zero_(grad_value), torch::stable::zero_(grad_locations), torch::stable::zero_(grad_weights);
    return {grad_value, grad_locations, grad_weights};
  }
  const PointTable table(p);
  Call call = make_call(p, table, value, locations, weights);
  call.grad_out = grad.const_data_ptr();
  call.grad_value = large_pages(grad_value);
  call.grad_locations = large_pages(grad_locations);
  call.grad_weights = large_pages(grad_weights);
  call.pack = worth_packing(p, 1);
  if (!call.pack) zero(call.grad_value, grad_value.numel() * (compute_type(value) == ScalarType::Double ? 8 : 4));
  const Kernels& chosen = kernels();
  torch::stable::parallel_for(0, p.batch * p.heads, 1,
                              [&](int64_t begin, int64_t end) { chosen.backward(call, begin, end); });
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace

// SymInt: a compiled graph keeps the sizes of its images symbolic, so that another size needs no other graph. The kernels get
// numbers all the same, since torch's stable ABI hands a SymInt over as an int64_t.
STABLE_TORCH_LIBRARY(detection_kd, library) {
  library.def(
      "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, int[] points, Tensor locations, Tensor weights) -> Tensor");
  // bound: a scalar that no |weight * grad_out| exceeds; where given, the sums do not depend on the order of additions
  library.def(
      "ms_deform_attn_backward(Tensor grad_out, Tensor value, SymInt[] spatial_shapes, int[] points, Tensor locations, "
      "Tensor weights, Tensor? bound) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(detection_kd, CPU, library) {
  library.impl("ms_deform_attn", TORCH_BOX(&forward));
  library.impl("ms_deform_attn_backward", TORCH_BOX(&backward));
}

}  // namespace deform_attn
