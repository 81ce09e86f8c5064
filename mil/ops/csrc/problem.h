// Shapes, dtypes and checks that the CPU and the CUDA binding share.
#pragma once
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "stable_tensor.h"

namespace deform_attn {

struct Problem {
  int64_t rows, heads, dim, queries, points, bags, levels;
  const int64_t* shapes;                  // height and width of every (bag, level), on the host
  std::vector<int64_t> bag_end;           // the query after the last one of each bag
  std::vector<int64_t> points_per_level;  // sums to `points`
};

inline void check_like(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes, ScalarType type,
                       const Tensor& value) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t i = 0; same && i < tensor.dim(); ++i) same = tensor.size(i) == sizes[i];
  STD_TORCH_CHECK(same, "sparse_deform_attn: ", name, " does not have the shape that value and locations imply");
  STD_TORCH_CHECK(tensor.scalar_type() == type, "sparse_deform_attn: ", name, " has another dtype than expected: locations ",
                  "and weights are float32, for float64 values float64; grad_out has the dtype of value; maps are int32");
  STD_TORCH_CHECK(tensor.is_cuda() == value.is_cuda() && tensor.get_device_index() == value.get_device_index(),
                  "sparse_deform_attn: ", name, " is on another device than value");
}

inline void check_host(const Tensor& tensor, const char* name, int64_t dim) {
  STD_TORCH_CHECK(!tensor.is_cuda() && tensor.scalar_type() == ScalarType::Long && tensor.dim() == dim &&
                      tensor.is_contiguous(),
                  "sparse_deform_attn: expected ", name, " as a contiguous int64 tensor of ", dim,
                  " dimensions on the host, where it is read without waiting for the device");
}

// value (T, M, D), maps (cells), shapes (B, L, 2) and bags (B) on the host, points L, locations (Q, M, P, 2), weights
// (Q, M, P), P the sum of points. `shapes` has to outlive the result.
inline Problem check_problem(const Tensor& value, const Tensor& maps, const Tensor& shapes, const Tensor& bags,
                             const std::vector<int64_t>& points, const Tensor& locations, const Tensor& weights) {
  STD_TORCH_CHECK(value.dim() == 3, "sparse_deform_attn: expected value (T, M, D), found ", value.dim(), " dimensions");
  STD_TORCH_CHECK(locations.dim() == 4, "sparse_deform_attn: expected locations (Q, M, P, 2), found ", locations.dim(),
                  " dimensions");
  const ScalarType type = value.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  "sparse_deform_attn: expected values of float32, float64, bfloat16 or float16");
  check_host(shapes, "shapes", 3);
  check_host(bags, "bags", 1);
  const int64_t levels = static_cast<int64_t>(points.size());
  STD_TORCH_CHECK(shapes.size(0) == bags.size(0) && shapes.size(1) == levels && shapes.size(2) == 2,
                  "sparse_deform_attn: expected height and width of ", levels, " levels for each of ", bags.size(0), " bags");
  Problem p{value.size(0), value.size(1), value.size(2), locations.size(0), locations.size(2), bags.size(0), levels,
            static_cast<const int64_t*>(shapes.const_data_ptr()), {}, points};
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  int64_t cells = 0, sum = 0, queries = 0;
  for (int64_t i = 0; i < p.bags * levels; ++i) {
    const int64_t height = p.shapes[2 * i], width = p.shapes[2 * i + 1];
    STD_TORCH_CHECK(height >= 0 && width >= 0 && height < kMost && width < kMost, "sparse_deform_attn: a size is negative");
    cells += height * width;
    STD_TORCH_CHECK(cells < kMost, "sparse_deform_attn: expected fewer than 2^31 cells");
  }
  for (const int64_t count : points) {
    STD_TORCH_CHECK(count >= 0, "sparse_deform_attn: a number of points is negative");
    sum += count;
  }
  for (int64_t bag = 0; bag < p.bags; ++bag) {
    const int64_t count = static_cast<const int64_t*>(bags.const_data_ptr())[bag];
    STD_TORCH_CHECK(count >= 0, "sparse_deform_attn: a number of queries is negative");
    p.bag_end.push_back(queries += count);
  }
  STD_TORCH_CHECK(p.rows < kMost, "sparse_deform_attn: expected fewer than 2^31 rows");
  STD_TORCH_CHECK(queries == p.queries, "sparse_deform_attn: the bags have ", queries, " queries, locations has ", p.queries);
  STD_TORCH_CHECK(sum == p.points, "sparse_deform_attn: the levels have ", sum, " points, locations has ", p.points);
  check_like(maps, "maps", {cells}, ScalarType::Int, value);
  check_like(locations, "locations", {p.queries, p.heads, p.points, 2}, compute_type(value), value);
  check_like(weights, "weights", {p.queries, p.heads, p.points}, compute_type(value), value);
  return p;
}

}  // namespace deform_attn
