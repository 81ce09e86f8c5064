// Tensors of torch's stable ABI (torch >= 2.10) as the bindings of the operators use them.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace deform_attn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// float64 values are computed in float64, everything else in float32; locations and weights come in that type.
inline ScalarType compute_type(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace deform_attn
