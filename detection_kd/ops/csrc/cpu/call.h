// One call of multi-scale deformable attention, in plain types: what the binding hands to the kernels of each instruction set.
#pragma once
#include "cpu_kernels.h"

namespace deform_attn {

// All tensors contiguous. `Real` below is double for kDouble and float else. Items of forward: batch * heads * chunks, of
// backward: batch * heads.
struct Call {
  Storage storage;
  int64_t batch, cells, heads, dim, queries, points;
  Points table;
  int64_t chunks;         // an item of forward is one sample, one head and one of this many parts of the queries
  bool pack;              // copy the values of an item side by side first
  const void* value;      // storage (batch, cells, heads, dim)
  const void* locations;  // Real (batch, queries, heads, points, 2), (x, y) as fractions of the level
  const void* weights;    // Real (batch, queries, heads, points)
  void* out;              // storage (batch, queries, heads * dim)
  // backward
  const void* grad_out;   // storage (batch, queries, heads * dim)
  void* grad_value;       // Real, as value; zeros, unless `pack`
  void* grad_locations;   // Real, as locations
  void* grad_weights;     // Real, as weights
};

}  // namespace deform_attn

// "avx512", "avx2", "baseline" or "auto"; returns the name in force, null when this build or processor does not have it.
extern "C" __attribute__((visibility("default"))) const char* ms_deform_attn_choose_kernels(const char* name);
