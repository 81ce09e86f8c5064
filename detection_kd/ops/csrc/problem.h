// Shapes, dtypes and checks that the CPU and the CUDA binding share, on torch's stable ABI (torch >= 2.10).
#pragma once
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "stable_tensor.h"

namespace deform_attn {

struct Problem {
  int64_t batch, cells, heads, dim, queries, points;
  std::vector<int64_t> shapes;            // H0, W0, H1, W1, ...
  std::vector<int64_t> points_per_level;  // sums to `points`
};

inline void check_like(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes, ScalarType type,
                       const Tensor& value) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t i = 0; same && i < tensor.dim(); ++i) same = tensor.size(i) == sizes[i];
  STD_TORCH_CHECK(same, "ms_deform_attn: ", name, " does not have the shape that value and locations imply");
  STD_TORCH_CHECK(tensor.scalar_type() == type, "ms_deform_attn: ", name, " has another dtype than expected: locations and ",
                  "weights are float32, for float64 values float64; grad_out has the dtype of value");
  STD_TORCH_CHECK(tensor.is_cuda() == value.is_cuda() && tensor.get_device_index() == value.get_device_index(),
                  "ms_deform_attn: ", name, " is on another device than value");
}

// value (N, S, M, D), shapes 2 L, points L, locations (N, Q, M, P, 2), weights (N, Q, M, P), P the sum of points.
inline Problem check_problem(const Tensor& value, const std::vector<int64_t>& shapes, const std::vector<int64_t>& points,
                             const Tensor& locations, const Tensor& weights) {
  STD_TORCH_CHECK(value.dim() == 4, "ms_deform_attn: expected value (N, S, M, D), found ", value.dim(), " dimensions");
  STD_TORCH_CHECK(locations.dim() == 5, "ms_deform_attn: expected locations (N, Q, M, P, 2), found ", locations.dim(),
                  " dimensions");
  const ScalarType type = value.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  "ms_deform_attn: expected values of float32, float64, bfloat16 or float16");
  Problem p{value.size(0), value.size(1), value.size(2), value.size(3), locations.size(1), locations.size(3), shapes, points};
  STD_TORCH_CHECK(shapes.size() == 2 * points.size(), "ms_deform_attn: expected height and width of ", points.size(),
                  " levels, found ", shapes.size(), " numbers");
  int64_t cells = 0, sum = 0;
  for (size_t level = 0; level < points.size(); ++level) {
    STD_TORCH_CHECK(shapes[2 * level] >= 0 && shapes[2 * level + 1] >= 0 && points[level] >= 0,
                    "ms_deform_attn: a size or a number of points is negative");
    cells += shapes[2 * level] * shapes[2 * level + 1];
    sum += points[level];
  }
  STD_TORCH_CHECK(cells == p.cells, "ms_deform_attn: the levels have ", cells, " cells, value has ", p.cells);
  STD_TORCH_CHECK(sum == p.points, "ms_deform_attn: the levels have ", sum, " points, locations has ", p.points);
  STD_TORCH_CHECK(cells < std::numeric_limits<int32_t>::max(), "ms_deform_attn: expected fewer than 2^31 cells a sample");
  check_like(locations, "locations", {p.batch, p.queries, p.heads, p.points, 2}, compute_type(value), value);
  check_like(weights, "weights", {p.batch, p.queries, p.heads, p.points}, compute_type(value), value);
  return p;
}

}  // namespace deform_attn
