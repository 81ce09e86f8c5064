// What the CPU kernels of the operators share with their bindings: storage types, where points look, one set of kernels for
// each instruction set.
//
// For the `call.h` of an operator, which says what a `Call` is and what the items of its two loops are.
#pragma once
#include <cstdint>

namespace deform_attn {

// Points are handled in blocks of this many; the arrays of `Points` are padded to a multiple of it.
constexpr int kBlock = 16;

enum class Storage { kFloat, kDouble, kBFloat16, kHalf };

// Where points look, by point: the size of the map, and where that map starts among all.
// Padding has size 0, so that no corner of it is ever inside.
struct Points {
  const int32_t* width;
  const int32_t* height;
  const int32_t* start;
};

struct Call;

// Items [begin, end) each; an item of backward owns its part of grad_value, so nothing is added by two threads and the order
// of additions is that of the queries whatever the number of threads.
struct Kernels {
  const char* name;
  void (*forward)(const Call& call, int64_t begin, int64_t end);
  void (*backward)(const Call& call, int64_t begin, int64_t end);
};

// Null where the unit was not built (another architecture).
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_baseline();

// The fastest that this processor runs, unless `choose_kernels` was called.
const Kernels& kernels();

}  // namespace deform_attn
