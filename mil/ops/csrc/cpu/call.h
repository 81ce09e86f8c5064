// One call of sparse deformable attention, in plain types: what the binding hands to the kernels of each instruction set.
#pragma once
#include <cstdint>

namespace deform_attn {

// Points are handled in blocks of this many; the arrays of `Points` are padded to a multiple of it.
constexpr int kBlock = 16;

enum class Storage { kFloat, kDouble, kBFloat16, kHalf };

// Where points look, by point: the size of the map of its bag and level, and where that map starts among all maps.
// Padding has size 0, so that no corner of it is ever inside.
struct Points {
  const int32_t* width;
  const int32_t* height;
  const int32_t* start;
};

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

// All tensors contiguous. `Real` below is double for kDouble and float else.
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

struct Kernels {
  const char* name;
  // queries [begin, end)
  void (*forward)(const Call& call, int64_t begin, int64_t end);
  // items [begin, end) of sections * heads; an item owns its part of grad_value, so nothing is added by two threads and the
  // order of additions is that of the queries whatever the number of threads
  void (*backward)(const Call& call, int64_t begin, int64_t end);
};

// Null where the unit was not built (another architecture).
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_baseline();

// The fastest that this processor runs, unless `choose_kernels` was called.
const Kernels& kernels();

}  // namespace deform_attn

// "avx512", "avx2", "baseline" or "auto"; returns the name in force, null when this build or processor does not have it.
extern "C" __attribute__((visibility("default"))) const char* sparse_deform_attn_choose_kernels(const char* name);
