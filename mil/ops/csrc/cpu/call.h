// One call of sparse deformable attention, in plain types: what the binding hands to the kernels of each instruction set.
#pragma once
#include "cpu_kernels.h"

namespace deform_attn {

// One bag at one level.
struct Map {
  int32_t height, width, start;
  int64_t first_query, end_query;  // of its bag
  int64_t first_point, points;     // of its level, among the points of a (query, head)
};

// Rows [first, end) of the values, which only maps [first_map, end_map) name: what one thread may add to.
struct Section {
  int64_t first, end;
  int64_t first_map, end_map;
};

// All tensors contiguous. `Real` below is double for kDouble and float else. Items of forward: queries, of backward:
// sections * heads.
struct Call {
  Storage storage;
  bool renormalise;
  int64_t rows, heads, dim, queries, points, bags;
  const int32_t* maps;       // cells of all maps: row of `value` or -1
  const int64_t* bag_end;    // (bags): the query after the last one of each bag
  const Points* points_of;   // (bags): heads * points of one query, padded
  const Map* sections_maps;  // maps in the order of the sections
  const Section* sections;
  const void* value;      // storage (rows, heads, dim)
  const void* locations;  // Real (queries, heads, points, 2), (x, y) in cells of the level, a cell's centre at integers
  const void* weights;    // Real (queries, heads, points)
  void* out;              // storage (queries, heads * dim)
  // backward
  const void* grad_out;   // storage (queries, heads * dim)
  void* grad_value;       // Real, as value; rows of no section are zeros already
  void* grad_locations;   // Real, as locations
  void* grad_weights;     // Real, as weights
};

}  // namespace deform_attn

// "avx512", "avx2", "baseline" or "auto"; returns the name in force, null when this build or processor does not have it.
extern "C" __attribute__((visibility("default"))) const char* sparse_deform_attn_choose_kernels(const char* name);
