// One call of multi-scale deformable attention, in plain types: what the binding hands to the kernels of each instruction set.
#pragma once
#include <cstdint>

namespace deform_attn {

// Points are handled in blocks of this many; the arrays of `Points` are padded to a multiple of it.
constexpr int kBlock = 16;

enum class Storage { kFloat, kDouble, kBFloat16, kHalf };

// Where the points of one (query, head) look, by point: its level's size and the first cell of that level.
// Padding has size 0, so that no corner of it is ever inside.
struct Points {
  const int32_t* width;
  const int32_t* height;
  const int32_t* start;
};

// All tensors contiguous. `Real` below is double for kDouble and float else.
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

struct Kernels {
  const char* name;
  // items [begin, end) of batch * heads * chunks
  void (*forward)(const Call& call, int64_t begin, int64_t end);
  // items [begin, end) of batch * heads; an item owns its part of grad_value, so nothing is added by two threads and the
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
extern "C" __attribute__((visibility("default"))) const char* deform_attn_choose_kernels(const char* name);
