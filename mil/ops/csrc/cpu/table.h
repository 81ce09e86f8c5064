// Points of sparse deformable attention -> table of rows and weights, in vectors across the points.
//
// With x0 = floor(x), lx = x - x0 (y alike), corner weights w00 = (1 - ly)(1 - lx) ..., r_c = the row that the map has for
// corner c (-1: no tile, or outside of the map) and p_c = [r_c >= 0]: n = sum_c p_c w_c when renormalised, 1 else, and a
// corner weighs A p_c w_c / n, with 0 / 0 = 0. A location that is not finite gives NaN and reads nothing.
#pragma once
#include "call.h"
#include "lanes.h"

namespace deform_attn {
namespace {

// `size` points, a multiple of kBlock.
template <class Real>
struct Table {
  explicit Table(int64_t size)
      : rows(4 * size), reals(8 * size), row{}, weight{}, x(reals.get() + 4 * size), y(x + size), attention(y + size),
        inverse(attention + size) {
    for (int c = 0; c < 4; ++c) row[c] = rows.get() + c * size, weight[c] = reals.get() + c * size;
  }

  Memory<int32_t> rows;
  Memory<Real> reals;
  int32_t* row[4];   // of corner 00, 01, 10, 11 (y, x); -1: nowhere
  Real* weight[4];   // A p_c w_c / n
  Real *x, *y;       // lx, ly
  Real *attention;   // A
  Real *inverse;     // 1 / n
};

// rows of the cells at `index` where `inside`, else -1
template <class I>
inline I look_up(const int32_t* maps, I index, I inside) {
  I out;
  for (unsigned i = 0; i < sizeof(I) / sizeof(out[0]); ++i) out[i] = inside[i] ? maps[index[i]] : -1;
  return out;
}
#if defined(__AVX512F__)
inline Lanes<float>::I look_up(const int32_t* maps, Lanes<float>::I index, Lanes<float>::I inside) {
  const __m512i lanes = reinterpret_cast<__m512i>(index), none = _mm512_set1_epi32(-1);
  const __mmask16 mask = _mm512_movepi32_mask(reinterpret_cast<__m512i>(inside));
  return reinterpret_cast<Lanes<float>::I>(_mm512_mask_i32gather_epi32(none, mask, lanes, maps, 4));
}
#elif defined(__AVX2__)
inline Lanes<float>::I look_up(const int32_t* maps, Lanes<float>::I index, Lanes<float>::I inside) {
  const __m256i lanes = reinterpret_cast<__m256i>(index), mask = reinterpret_cast<__m256i>(inside);
  return reinterpret_cast<Lanes<float>::I>(_mm256_mask_i32gather_epi32(_mm256_set1_epi32(-1), maps, lanes, mask, 4));
}
#endif

template <class I>
inline void store_rows(I rows, int32_t* to) {
  for (unsigned i = 0; i < sizeof(I) / sizeof(rows[0]); ++i) to[i] = static_cast<int32_t>(rows[i]);
}

// Points [at, at + Lanes::kSize) of a table; `levels` begins at the first of them.
template <class Real>
inline void fill_lanes(Table<Real>& table, int64_t at, const Call& call, const Real* locations, const Real* weights,
                       const Points& levels) {
  using R = typename Lanes<Real>::R;
  using I = typename Lanes<Real>::I;
  const I width = load_lanes<I>(levels.width), height = load_lanes<I>(levels.height), minus_one = I{} - 1;
  const R w = __builtin_convertvector(width, R), h = __builtin_convertvector(height, R), a = load_lanes<R>(weights);
  const R zero = R{}, one = zero + 1;
  const R x = load_lanes<R>(locations, 2), y = load_lanes<R>(locations + 1, 2);
  const I near = (x > -one) & (x < w) & (y > -one) & (y < h);  // false for NaN too
  const R safe_x = near ? x : zero, safe_y = near ? y : zero;
  I x0 = __builtin_convertvector(safe_x, I), y0 = __builtin_convertvector(safe_y, I);  // towards 0: floor, but for (-1, 0)
  x0 = safe_x < zero ? minus_one : x0;
  y0 = safe_y < zero ? minus_one : y0;
  const R lx = safe_x - __builtin_convertvector(x0, R), ly = safe_y - __builtin_convertvector(y0, R);
  const I left = near & (x0 >= 0), right = near & (x0 + 1 < width), top = y0 >= 0, bottom = y0 + 1 < height;
  const I cell = load_lanes<I>(levels.start) + y0 * width + x0;
  const I inside[4] = {top & left, top & right, bottom & left, bottom & right};
  const I cells[4] = {cell, cell + 1, cell + width, cell + width + 1};
  const R products[4] = {(one - ly) * (one - lx), (one - ly) * lx, ly * (one - lx), ly * lx};
  R present[4], sum = zero;
  for (int c = 0; c < 4; ++c) {
    const I row = look_up(call.maps, cells[c], inside[c]);
    store_rows<I>(row, table.row[c] + at);
    present[c] = row >= 0 ? products[c] : zero;
    sum += present[c];
  }
  R inverse = one;
  if (call.renormalise) inverse = sum > zero ? one / (sum > zero ? sum : one) : zero;
  const R nan_or_zero = (x - x) + (y - y), scale = a * inverse;
  store_lanes(scale * present[0] + nan_or_zero, table.weight[0] + at);
  for (int c = 1; c < 4; ++c) store_lanes(scale * present[c], table.weight[c] + at);
  store_lanes(lx, table.x + at);
  store_lanes(ly, table.y + at);
  store_lanes(a + nan_or_zero, table.attention + at);
  store_lanes(inverse, table.inverse + at);
}

// `count` points, contiguous; those up to the next multiple of kBlock lie nowhere.
template <class Real>
inline void fill(Table<Real>& table, const Call& call, const Real* locations, const Real* weights, const Points& levels,
                 int64_t count) {
  for (int64_t first = 0; first < count; first += kBlock) {
    alignas(64) Real padded[3 * kBlock];
    const Real *xy = locations + 2 * first, *a = weights + first;
    if (const int64_t left = count - first; left < kBlock) {
      for (int i = 0; i < 3 * kBlock; ++i) padded[i] = 0;
      for (int64_t i = 0; i < 2 * left; ++i) padded[i] = xy[i];
      for (int64_t i = 0; i < left; ++i) padded[2 * kBlock + i] = a[i];
      xy = padded, a = padded + 2 * kBlock;
    }
    for (int64_t at = 0; at < kBlock; at += Lanes<Real>::kSize) {
      const int64_t to = first + at;
      fill_lanes<Real>(table, to, call, xy + 2 * at, a + at, {levels.width + to, levels.height + to, levels.start + to});
    }
  }
}

}  // namespace
}  // namespace deform_attn
