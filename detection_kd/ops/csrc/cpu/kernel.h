// Forward and backward of multi-scale deformable attention for one instruction set.
//
// Source: Deformable DETR (Zhu et al., ICLR 2021, arXiv:2010.04159), equation 3. With x = loc_x W - 0.5, x0 = floor(x),
// lx = x - x0 (y alike), corner weights w00 = (1 - ly)(1 - lx) ... and V_c = 0 for corners outside of the level:
//   out = sum over points A sum_c w_c V_c
// and, with g the gradient of out and s_c = <g, V_c>:
//   dA = sum_c w_c s_c,   dV_c += A w_c g
//   dloc_x = A W [(1 - ly)(s01 - s00) + ly (s11 - s10)],   dloc_y = A H [(1 - lx)(s10 - s00) + lx (s11 - s01)]
//
// Work is cut by (sample, head). Where many rows are read, the head's values are first copied side by side: a window of the
// map then fits the second-level cache, which it does not with the other heads in between. A block of points is turned into
// a table of rows and weights, in vectors across the points; then rows are read in vectors across the channels. A corner outside reads a row of zeros and writes a row that is thrown away: it never
// multiplies a value that it does not own, which might be infinite. A location that is not finite gives NaN, as
// grid_sample does, and reads nothing.
#pragma once
#include "call.h"
#include "lanes.h"

namespace deform_attn {
namespace {

template <class Real>
struct Block {
  alignas(64) int32_t row[4][kBlock];  // cell of corner 00, 01, 10, 11 (y, x); outside: -1, or the row after the last cell
  alignas(64) Real weight[4][kBlock];  // A w_c, 0 where outside
  alignas(64) Real x[kBlock], y[kBlock];          // lx, ly
  alignas(64) Real attention[kBlock];
  alignas(64) Real padded[3 * kBlock];  // the last block's locations and weights, padded
};

constexpr int64_t kAhead = 6;  // queries between a prefetch and its use

// The cells of one sample and head: `stride` numbers from one to the next.
template <class T>
struct Cells {
  T* data;
  int64_t stride;
};

// Copies the values of a head to rows of `stride` numbers, the row after the last one stays zero.
template <class T, class S>
inline void pack(const S* value, const Call& call, T* packed, int64_t stride) {
  const int64_t from_stride = call.heads * call.dim;
  for (int64_t cell = 0; cell < call.cells; ++cell, value += from_stride, packed += stride) {
    prefetch(value + kAhead * from_stride, call.dim);
    for (int64_t d = 0; d < call.dim; ++d) {
      if constexpr (kSame<T, S>) packed[d] = value[d];
      else packed[d] = widen(value[d]);
    }
  }
}

template <class I>
inline void store_rows(I rows, int32_t* to) {
  for (unsigned i = 0; i < sizeof(I) / sizeof(rows[0]); ++i) to[i] = static_cast<int32_t>(rows[i]);
}

// Points [at, at + Lanes::kSize) of a block, of which locations, weights and levels are given.
template <class Real>
inline void fill_lanes(Block<Real>& block, int at, const Real* locations, const Real* weights, const Points& levels,
                       int64_t row_outside) {
  using R = typename Lanes<Real>::R;
  using I = typename Lanes<Real>::I;
  const I width = load_lanes<I>(levels.width), height = load_lanes<I>(levels.height);
  const I start = load_lanes<I>(levels.start), minus_one = I{} - 1;
  const I outside = I{} + static_cast<typename Lanes<Real>::Integer>(row_outside);
  const R w = __builtin_convertvector(width, R), h = __builtin_convertvector(height, R), a = load_lanes<R>(weights);
  const R zero = R{}, one = zero + 1;
  const R x = load_lanes<R>(locations, 2) * w - Real(0.5), y = load_lanes<R>(locations + 1, 2) * h - Real(0.5);
  const I near = (x > -one) & (x < w) & (y > -one) & (y < h);  // false for NaN too
  const R safe_x = near ? x : zero, safe_y = near ? y : zero;
  I x0 = __builtin_convertvector(safe_x, I), y0 = __builtin_convertvector(safe_y, I);  // towards 0: floor, but for (-1, 0)
  x0 = safe_x < zero ? minus_one : x0;
  y0 = safe_y < zero ? minus_one : y0;
  const R lx = safe_x - __builtin_convertvector(x0, R), ly = safe_y - __builtin_convertvector(y0, R);
  const I left = near & (x0 >= 0), right = near & (x0 + 1 < width), top = y0 >= 0, bottom = y0 + 1 < height;
  const I row = start + y0 * width + x0;
  store_rows<I>((top & left) ? row : outside, block.row[0] + at);
  store_rows<I>((top & right) ? row + 1 : outside, block.row[1] + at);
  store_rows<I>((bottom & left) ? row + width : outside, block.row[2] + at);
  store_rows<I>((bottom & right) ? row + width + 1 : outside, block.row[3] + at);
  const R nan_or_zero = (x - x) + (y - y), upper = a * (one - ly), lower = a * ly;
  store_lanes(((top & left) ? upper * (one - lx) : zero) + nan_or_zero, block.weight[0] + at);
  store_lanes((top & right) ? upper * lx : zero, block.weight[1] + at);
  store_lanes((bottom & left) ? lower * (one - lx) : zero, block.weight[2] + at);
  store_lanes((bottom & right) ? lower * lx : zero, block.weight[3] + at);
  store_lanes(lx, block.x + at);
  store_lanes(ly, block.y + at);
  store_lanes(a + nan_or_zero, block.attention + at);
}

// Points [first, first + kBlock) of one query and head; those beyond the last one lie outside.
template <class Real>
inline void fill(Block<Real>& block, const Call& call, const Real* locations, const Real* weights, int64_t first) {
  const int64_t count = call.points - first, row_outside = call.pack ? call.cells : -1;
  locations += 2 * first;
  weights += first;
  if (count < kBlock) {
    for (int i = 0; i < 3 * kBlock; ++i) block.padded[i] = 0;
    for (int i = 0; i < 2 * count; ++i) block.padded[i] = locations[i];
    for (int i = 0; i < count; ++i) block.padded[2 * kBlock + i] = weights[i];
    locations = block.padded;
    weights = block.padded + 2 * kBlock;
  }
  for (int at = 0; at < kBlock; at += Lanes<Real>::kSize) {
    const Points& table = call.table;
    const Points levels{table.width + first + at, table.height + first + at, table.start + first + at};
    fill_lanes(block, at, locations + 2 * at, weights + at, levels, row_outside);
  }
}

// Row of a corner; outside of the level it is `elsewhere`. In packed cells the row of corners outside is a real one, the last.
template <bool kPacked, class T>
inline T* row_of(const Cells<T>& cells, int64_t row, T* elsewhere) {
  T* const inside = cells.data + row * cells.stride;
  if constexpr (kPacked) return inside;
  return __builtin_expect_with_probability(row < 0, 0, 0.5) ? elsewhere : inside;  // a conditional move, not a jump
}

// sum[channel ...] += weight * row, over the corners of a block's points.
template <class Real, class S, bool kPacked>
struct Gather {
  const Block<Real>& block;
  int count;
  Cells<const S> value;
  const S* zeros;
  Real* sum;
  bool from_zero;

  template <class P, int kCount>
  void operator()(int64_t channel) const {
    constexpr int kChains = kCount >= 4 ? 2 : 4;  // sums that do not wait for each other
    P sums[kChains][kCount];
    for (int v = 0; v < kCount; ++v) {
      sums[0][v] = from_zero ? P::all(0) : P::load(sum + channel + v * P::kSize);
      for (int chain = 1; chain < kChains; ++chain) sums[chain][v] = P::all(0);
    }
    for (int i = 0; i < count; ++i) {
      for (int c = 0; c < 4; ++c) {
        const S* from = row_of<kPacked>(value, block.row[c][i], zeros) + channel;
        const P weight = P::all(block.weight[c][i]);
        for (int v = 0; v < kCount; ++v)
          sums[c % kChains][v] = sums[c % kChains][v].add_product(weight, P::load(from + v * P::kSize));
      }
    }
    for (int v = 0; v < kCount; ++v) {
      P total = sums[0][v];
      for (int chain = 1; chain < kChains; ++chain) total = total + sums[chain][v];
      total.store(sum + channel + v * P::kSize);
    }
  }
};

template <class Real, class S, bool kPacked>
void forward_of(const Call& call, int64_t begin, int64_t end) {
  const int64_t heads = call.heads, dim = call.dim, points = call.points, queries = call.queries;
  const Real* locations = static_cast<const Real*>(call.locations);
  const Real* weights = static_cast<const Real*>(call.weights);
  const Memory<S> packed(kPacked ? (call.cells + 1) * dim : 0), zeros(dim);
  const Memory<Real> scratch(dim);
  Block<Real> block;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t chunk = item % call.chunks, head = item / call.chunks % heads, sample = item / call.chunks / heads;
    const S* values = static_cast<const S*>(call.value) + (sample * call.cells * heads + head) * dim;
    if constexpr (kPacked) pack(values, call, packed.get(), dim);
    const Cells<const S> value = kPacked ? Cells<const S>{packed.get(), dim} : Cells<const S>{values, heads * dim};
    for (int64_t query = queries * chunk / call.chunks; query < queries * (chunk + 1) / call.chunks; ++query) {
      const int64_t group = (sample * queries + query) * heads + head, ahead = group + kAhead * heads;
      prefetch(locations + ahead * points * 2, points * 2);  // beyond the last query it reads nothing
      prefetch(weights + ahead * points, points);
      S* out = static_cast<S*>(call.out) + group * dim;
      Real* sum = scratch.get();
      if constexpr (kSame<Real, S>) sum = out;  // sums are built in place
      int64_t first = 0;
      do {  // once even without points, which gives zeros
        const int count = static_cast<int>(points - first < kBlock ? points - first : kBlock);
        if (count > 0) fill(block, call, locations + group * points * 2, weights + group * points, first);
        over_channels<Real>(dim, Gather<Real, S, kPacked>{block, count, value, zeros.get(), sum, first == 0});
        first += kBlock;
      } while (first < points);
      if constexpr (!kSame<Real, S>)
        for (int64_t d = 0; d < dim; ++d) narrow(sum[d], out + d);
    }
  }
}

// Where a corner's values are read and its gradient is added. Packed, each row holds the values and then the gradient.
template <class Real, class S, bool kPacked>
struct Corners {
  Cells<const S> value;
  Cells<Real> grad_value;
  const S* zeros;
  Real* thrown_away;

  const S* from(int64_t row) const { return row_of<false>(value, row, zeros); }
  Real* to(int64_t row) const { return row_of<false>(grad_value, row, thrown_away); }
};
template <class Real, class S>
struct Corners<Real, S, true> {
  Real* pairs;
  int64_t dim;

  const Real* from(int64_t row) const { return pairs + row * 2 * dim; }
  Real* to(int64_t row) const { return pairs + row * 2 * dim + dim; }
};

// dots[c][point] += <g, V_c> and dV_c += weight g over the channels of a pack; four points at a time.
template <class Real, class S, bool kPacked>
struct Scatter {
  const Block<Real>& block;
  int count;
  Corners<Real, S, kPacked> corners;
  const Real* grad;
  Real (*dots)[kBlock];

  template <class P, int kCount>
  void operator()(int64_t channel) const {
    P g[kCount];
    for (int v = 0; v < kCount; ++v) g[v] = P::load(grad + channel + v * P::kSize);
    for (int i = 0; i < count; i += 4) {  // points beyond `count` lie outside
      P products[4][4];
      for (int j = 0; j < 4; ++j)
        for (int c = 0; c < 4; ++c) {
          const int64_t row = block.row[c][i + j];
          const auto* from = corners.from(row) + channel;
          Real* to = corners.to(row) + channel;
          const P weight = P::all(block.weight[c][i + j]);
          P product = P::all(0);
          for (int v = 0; v < kCount; ++v) {
            product = product.add_product(g[v], P::load(from + v * P::kSize));
            P::load(to + v * P::kSize).add_product(weight, g[v]).store(to + v * P::kSize);
          }
          products[j][c] = product;
        }
      Real* sums[4] = {dots[0] + i, dots[1] + i, dots[2] + i, dots[3] + i};
      add_lane_sums(products, sums);
    }
  }
};

template <class Real>
inline void finish(const Block<Real>& block, const Call& call, const Real (*s)[kBlock], int64_t first, int count,
                   Real* grad_locations, Real* grad_weights) {
  alignas(64) Real at_x[kBlock], at_y[kBlock], at_weight[kBlock];
  for (int i = 0; i < kBlock; ++i) {
    const Real lx = block.x[i], ly = block.y[i], a = block.attention[i];
    const Real top = s[1][i] - s[0][i], bottom = s[3][i] - s[2][i];
    const Real left = s[2][i] - s[0][i], right = s[3][i] - s[1][i];
    at_x[i] = a * static_cast<Real>(call.table.width[first + i]) * ((1 - ly) * top + ly * bottom);
    at_y[i] = a * static_cast<Real>(call.table.height[first + i]) * ((1 - lx) * left + lx * right);
    at_weight[i] = (1 - ly) * ((1 - lx) * s[0][i] + lx * s[1][i]) + ly * ((1 - lx) * s[2][i] + lx * s[3][i]);
  }
  for (int i = 0; i < count; ++i) {
    grad_locations[2 * (first + i)] = at_x[i];
    grad_locations[2 * (first + i) + 1] = at_y[i];
    grad_weights[first + i] = at_weight[i];
  }
}

template <class Real, class S, bool kPacked>
void backward_of(const Call& call, int64_t begin, int64_t end) {
  const int64_t heads = call.heads, dim = call.dim, points = call.points, stride = heads * dim;
  const Real* locations = static_cast<const Real*>(call.locations);
  const Real* weights = static_cast<const Real*>(call.weights);
  const S* grad_out = static_cast<const S*>(call.grad_out);
  const Memory<Real> pairs(kPacked ? (call.cells + 1) * 2 * dim : 0), thrown_away(dim), grad(dim);
  const Memory<S> zeros(dim);
  Block<Real> block;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t sample = item / heads, head = item % heads, first_cell = (sample * call.cells * heads + head) * dim;
    const S* value = static_cast<const S*>(call.value) + first_cell;
    const Cells<Real> result{static_cast<Real*>(call.grad_value) + first_cell, stride};
    const Cells<Real> packed_grad{pairs.get() + dim, 2 * dim};
    Corners<Real, S, kPacked> corners;
    if constexpr (kPacked) {
      pack(value, call, pairs.get(), 2 * dim);
      for (int64_t cell = 0; cell < call.cells; ++cell)
        for (int64_t d = 0; d < dim; ++d) packed_grad.data[cell * 2 * dim + d] = 0;
      corners = {pairs.get(), dim};
    } else {
      corners = {{value, stride}, result, zeros.get(), thrown_away.get()};
    }
    for (int64_t query = sample * call.queries; query < (sample + 1) * call.queries; ++query) {
      const int64_t group = query * heads + head, ahead = group + kAhead * heads;
      prefetch(locations + ahead * points * 2, points * 2);
      prefetch(weights + ahead * points, points);
      prefetch(grad_out + ahead * dim, dim);
      for (int64_t d = 0; d < dim; ++d) grad.get()[d] = widen(grad_out[group * dim + d]);
      for (int64_t first = 0; first < points; first += kBlock) {
        const int count = static_cast<int>(points - first < kBlock ? points - first : kBlock);
        fill(block, call, locations + group * points * 2, weights + group * points, first);
        alignas(64) Real dots[4][kBlock] = {};
        over_channels<Real>(dim, Scatter<Real, S, kPacked>{block, count, corners, grad.get(), dots});
        finish(block, call, dots, first, count, static_cast<Real*>(call.grad_locations) + group * points * 2,
               static_cast<Real*>(call.grad_weights) + group * points);
      }
    }
    if constexpr (kPacked)
      for (int64_t cell = 0; cell < call.cells; ++cell)
        for (int64_t d = 0; d < dim; ++d) result.data[cell * stride + d] = packed_grad.data[cell * 2 * dim + d];
  }
}

template <class Real, class S>
void forward_as(const Call& call, int64_t begin, int64_t end) {
  call.pack ? forward_of<Real, S, true>(call, begin, end) : forward_of<Real, S, false>(call, begin, end);
}

template <class Real, class S>
void backward_as(const Call& call, int64_t begin, int64_t end) {
  call.pack ? backward_of<Real, S, true>(call, begin, end) : backward_of<Real, S, false>(call, begin, end);
}

void forward(const Call& call, int64_t begin, int64_t end) {
  switch (call.storage) {
    case Storage::kFloat: return forward_as<float, float>(call, begin, end);
    case Storage::kDouble: return forward_as<double, double>(call, begin, end);
    case Storage::kBFloat16: return forward_as<float, BFloat16>(call, begin, end);
    case Storage::kHalf: return forward_as<float, Half>(call, begin, end);
  }
}

void backward(const Call& call, int64_t begin, int64_t end) {
  switch (call.storage) {
    case Storage::kFloat: return backward_as<float, float>(call, begin, end);
    case Storage::kDouble: return backward_as<double, double>(call, begin, end);
    case Storage::kBFloat16: return backward_as<float, BFloat16>(call, begin, end);
    case Storage::kHalf: return backward_as<float, Half>(call, begin, end);
  }
}

}  // namespace
}  // namespace deform_attn
