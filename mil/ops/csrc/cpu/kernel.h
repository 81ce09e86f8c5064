// Forward and backward of sparse deformable attention for one instruction set.
//
// Source: Deformable DETR (Zhu et al., ICLR 2021, arXiv:2010.04159), equation 3, over tiles that an index map finds in place
// of a dense map. Names as in table.h, and g the gradient of out, s_c = <g, V_c>, o = sum_c p_c w_c s_c / n:
//   out = sum over points A sum_c p_c w_c V_c / n,   dA = o,   dV_c += A p_c w_c g / n
//   dx = A / n [(1 - ly)(t01 - t00) + ly (t11 - t10)],   dy = A / n [(1 - lx)(t10 - t00) + lx (t11 - t01)]
// with t_c = p_c s_c, less p_c o when renormalised: the quotient rule, since n moves with the location too.
//
// Forward is cut by queries: the corners of a query are listed and its rows are asked for before the query before it is summed
// up, and only corners with a tile are visited. Backward is cut by (section of rows, head): the head's values and their gradient are first laid side by side, so that a
// window of the map fits the second-level cache. A corner that is nowhere reads a row of zeros and writes a row that is thrown
// away: it never multiplies a value that it does not own, which might be infinite.
#pragma once
#include "table.h"

namespace deform_attn {
namespace {

// The corners of a query that have a tile, head by head.
template <class Real, class S>
struct Corners {
  Corners(int64_t heads, int64_t points) : from(4 * heads * points), weight(4 * heads * points), end(heads) {}

  Memory<const S*> from;  // the head's values
  Memory<Real> weight;
  Memory<int64_t> end;    // of each head
};

// sum[channel ...] = sum of weight * values, over corners [first, end).
template <class Real, class S>
struct Gather {
  const S* const* from;
  const Real* weight;
  int64_t first, end;
  Real* sum;

  template <class P, int kCount>
  void operator()(int64_t channel) const {
    constexpr int kChains = kCount >= 4 ? 2 : 4;  // sums that do not wait for each other
    P sums[kChains][kCount];
    for (int chain = 0; chain < kChains; ++chain)
      for (int v = 0; v < kCount; ++v) sums[chain][v] = P::all(0);
    int64_t i = first;
    for (; i + kChains <= end; i += kChains)
      for (int chain = 0; chain < kChains; ++chain) add(sums[chain], i + chain, channel);
    for (; i < end; ++i) add(sums[0], i, channel);
    for (int v = 0; v < kCount; ++v) {
      P total = sums[0][v];
      for (int chain = 1; chain < kChains; ++chain) total = total + sums[chain][v];
      total.store(sum + channel + v * P::kSize);
    }
  }

  template <class P, int kCount>
  void add(P (&sums)[kCount], int64_t i, int64_t channel) const {
    const P w = P::all(weight[i]);
    for (int v = 0; v < kCount; ++v) sums[v] = sums[v].add_product(w, P::load(from[i] + channel + v * P::kSize));
  }
};

// Lists the corners of a table that have a tile, and asks for their values. One that is not finite reads zeros.
template <class Real, class S>
inline void list(const Table<Real>& table, const Call& call, const S* value, const S* zeros, Corners<Real, S>& corners) {
  const S** from = corners.from.get();
  Real* weight = corners.weight.get();
  int64_t count = 0;
  for (int64_t head = 0; head < call.heads; ++head, value += call.dim) {
    for (int64_t i = head * call.points; i < (head + 1) * call.points; ++i)
      for (int c = 0; c < 4; ++c) {  // without a jump: whether a tile is there cannot be foreseen
        const int64_t row = table.row[c][i];
        const Real w = table.weight[c][i];
        from[count] = __builtin_expect_with_probability(row < 0, 0, 0.5) ? zeros : value + row * call.heads * call.dim;
        weight[count] = w;
        count += (row >= 0) | (w != w);
      }
    corners.end.get()[head] = count;
  }
  for (int64_t i = 0; i < count; ++i) prefetch(from[i], call.dim);
}

template <class Real, class S>
void forward_of(const Call& call, int64_t begin, int64_t end) {
  const int64_t heads = call.heads, dim = call.dim, all = heads * call.points;
  const Real* locations = static_cast<const Real*>(call.locations);
  const Real* weights = static_cast<const Real*>(call.weights);
  const Memory<S> zeros(dim);
  const Memory<Real> scratch(dim);
  Table<Real> table((all + kBlock - 1) / kBlock * kBlock);
  Corners<Real, S> corners[2] = {{heads, call.points}, {heads, call.points}};
  int64_t bag = 0;
  const auto prepare = [&](int64_t query) {
    while (query >= call.bag_end[bag]) ++bag;
    fill(table, call, locations + query * all * 2, weights + query * all, call.points_of[bag], all);
    list(table, call, static_cast<const S*>(call.value), zeros.get(), corners[query % 2]);
  };
  prepare(begin);
  for (int64_t query = begin; query < end; ++query) {
    if (query + 1 < end) prepare(query + 1);
    const Corners<Real, S>& ready = corners[query % 2];
    S* out = static_cast<S*>(call.out) + query * heads * dim;
    int64_t first = 0;
    for (int64_t head = 0; head < heads; ++head, out += dim) {
      Real* sum = scratch.get();
      if constexpr (kSame<Real, S>) sum = out;
      const int64_t last = ready.end.get()[head];
      over_channels<Real>(dim, Gather<Real, S>{ready.from.get(), ready.weight.get(), first, last, sum});
      if constexpr (!kSame<Real, S>)
        for (int64_t d = 0; d < dim; ++d) narrow(sum[d], out + d);
      first = last;
    }
  }
}

// f(pointer of the storage's type); double is computed in double and nothing else is.
template <class Real, class F>
inline void as_stored(Storage storage, const void* data, F&& f) {
  if constexpr (kSame<Real, double>) return f(static_cast<const double*>(data));
  else if (storage == Storage::kBFloat16) f(static_cast<const BFloat16*>(data));
  else if (storage == Storage::kHalf) f(static_cast<const Half*>(data));
  else f(static_cast<const float*>(data));
}

// `count` rows of `dim` numbers, `from_stride` and `to_stride` apart.
template <class Real>
inline void widen_rows(Storage storage, const void* data, int64_t offset, int64_t from_stride, int64_t count, int64_t dim,
                       Real* to, int64_t to_stride) {
  as_stored<Real>(storage, data, [&](auto from) {
    constexpr int64_t kAhead = 6;  // the other heads lie between two rows
    from += offset;
    for (int64_t row = 0; row < count; ++row, from += from_stride, to += to_stride) {
      prefetch(from + kAhead * from_stride, dim);
      for (int64_t d = 0; d < dim; ++d) to[d] = widen(from[d]);
    }
  });
}

// Units are up to four points of one query, head and level; a tile of them shares a table.
constexpr int64_t kUnit = 4, kUnits = 16, kTile = kUnit * kUnits;

// dots[c][point] += <g, V_c> and dV_c += weight g over the channels of a pack, for the points of one unit.
template <class Real>
struct Scatter {
  const Table<Real>& table;
  int64_t at;
  Real* pairs;  // each row holds the values and then their gradient; the last one stands for nowhere
  int64_t dim;
  const Real* grad;
  Real (*dots)[kTile];

  template <class P, int kCount>
  void operator()(int64_t channel) const {
    P g[kCount];
    for (int v = 0; v < kCount; ++v) g[v] = P::load(grad + channel + v * P::kSize);
    P products[4][4];
    for (int j = 0; j < 4; ++j)
      for (int c = 0; c < 4; ++c) {
        const Real* from = pairs + int64_t(table.row[c][at + j]) * 2 * dim + channel;
        Real* to = const_cast<Real*>(from) + dim;
        const P weight = P::all(table.weight[c][at + j]);
        P product = P::all(0);
        for (int v = 0; v < kCount; ++v) {
          product = product.add_product(g[v], P::load(from + v * P::kSize));
          P::load(to + v * P::kSize).add_product(weight, g[v]).store(to + v * P::kSize);
        }
        products[j][c] = product;
      }
    Real* sums[4] = {dots[0] + at, dots[1] + at, dots[2] + at, dots[3] + at};
    add_lane_sums(products, sums);
  }
};

// One tile of units: points [first_unit, first_unit + units) of a map, gathered from queries.
template <class Real>
struct Tile {
  const Call& call;
  const Map& map;
  int64_t head, first_unit, units, units_of_query;
  alignas(64) Real locations[2 * kTile];
  alignas(64) Real weights[kTile];
  alignas(64) Real dots[4][kTile];

  int64_t query(int64_t unit) const { return map.first_query + (first_unit + unit) / units_of_query; }
  int64_t point(int64_t unit) const { return (first_unit + unit) % units_of_query * kUnit; }
  int64_t count(int64_t unit) const {
    const int64_t left = map.points - point(unit);
    return left < kUnit ? left : kUnit;
  }
  int64_t source(int64_t unit) const {
    return (query(unit) * call.heads + head) * call.points + map.first_point + point(unit);
  }

  // Points beyond the last one of a level have weight 0 and lie outside.
  void load() {
    for (int64_t i = 0; i < 2 * kTile; ++i) locations[i] = Real(-2);
    for (int64_t i = 0; i < kTile; ++i) weights[i] = 0;
    for (int64_t unit = 0; unit < units; ++unit) {
      const Real* xy = static_cast<const Real*>(call.locations) + 2 * source(unit);
      const Real* a = static_cast<const Real*>(call.weights) + source(unit);
      for (int64_t i = 0; i < 2 * count(unit); ++i) locations[unit * 2 * kUnit + i] = xy[i];
      for (int64_t i = 0; i < count(unit); ++i) weights[unit * kUnit + i] = a[i];
    }
  }

  // Gradients of locations and weights from the dots with the corners' values.
  void finish(const Table<Real>& table, int32_t nowhere) const {
    alignas(64) Real at_x[kTile], at_y[kTile], at_weight[kTile];
    for (int64_t i = 0; i < kTile; ++i) {
      const Real lx = table.x[i], ly = table.y[i], scale = table.attention[i] * table.inverse[i];
      Real t[4];
      for (int c = 0; c < 4; ++c) t[c] = dots[c][i];
      const Real sum = (1 - ly) * ((1 - lx) * t[0] + lx * t[1]) + ly * ((1 - lx) * t[2] + lx * t[3]);
      const Real o = at_weight[i] = sum * table.inverse[i], less = call.renormalise ? o : Real(0);
      for (int c = 0; c < 4; ++c) t[c] -= table.row[c][i] == nowhere ? Real(0) : less;
      at_x[i] = scale * ((1 - ly) * (t[1] - t[0]) + ly * (t[3] - t[2]));
      at_y[i] = scale * ((1 - lx) * (t[2] - t[0]) + lx * (t[3] - t[1]));
    }
    for (int64_t unit = 0; unit < units; ++unit) {
      Real* xy = static_cast<Real*>(call.grad_locations) + 2 * source(unit);
      Real* a = static_cast<Real*>(call.grad_weights) + source(unit);
      for (int64_t i = 0; i < count(unit); ++i) {
        xy[2 * i] = at_x[unit * kUnit + i];
        xy[2 * i + 1] = at_y[unit * kUnit + i];
        a[i] = at_weight[unit * kUnit + i];
      }
    }
  }
};

// All points of one map and head.
template <class Real>
void backward_of_map(const Call& call, const Map& map, const Section& section, int64_t head, Real* pairs, Real* grads) {
  const int64_t dim = call.dim, stride = call.heads * dim, units_of_query = (map.points + kUnit - 1) / kUnit;
  const int64_t all = (map.end_query - map.first_query) * units_of_query;
  const int32_t first_row = static_cast<int32_t>(section.first), nowhere = static_cast<int32_t>(section.end - section.first);
  Table<Real> table(kTile);
  alignas(64) int32_t levels[3][kTile];
  for (int64_t i = 0; i < kTile; ++i) levels[0][i] = map.width, levels[1][i] = map.height, levels[2][i] = map.start;
  for (int64_t first = 0; first < all; first += kUnits) {
    Tile<Real> tile{call, map, head, first, all - first < kUnits ? all - first : kUnits, units_of_query, {}, {}, {}};
    tile.load();
    fill(table, call, tile.locations, tile.weights, {levels[0], levels[1], levels[2]}, kTile);
    for (int c = 0; c < 4; ++c)
      for (int64_t i = 0; i < kTile; ++i) table.row[c][i] = table.row[c][i] < 0 ? nowhere : table.row[c][i] - first_row;
    const int64_t first_query = tile.query(0), queries = tile.query(tile.units - 1) - first_query + 1;
    widen_rows(call.storage, call.grad_out, first_query * stride + head * dim, stride, queries, dim, grads, dim);
    for (int64_t unit = 0; unit < tile.units; ++unit) {
      const Real* grad = grads + (tile.query(unit) - first_query) * dim;
      over_channels<Real>(dim, Scatter<Real>{table, unit * kUnit, pairs, dim, grad, tile.dots});
    }
    tile.finish(table, nowhere);
  }
}

template <class Real>
void backward_of(const Call& call, int64_t begin, int64_t end) {
  const int64_t dim = call.dim, stride = call.heads * dim;
  const Memory<Real> grads(kUnits * dim);
  for (int64_t item = begin; item < end; ++item) {
    const Section& section = call.sections[item / call.heads];
    const int64_t head = item % call.heads, offset = section.first * stride + head * dim, rows = section.end - section.first;
    const Memory<Real> pairs((rows + 1) * 2 * dim);
    widen_rows(call.storage, call.value, offset, stride, rows, dim, pairs.get(), 2 * dim);
    for (int64_t map = section.first_map; map < section.end_map; ++map)
      backward_of_map(call, call.sections_maps[map], section, head, pairs.get(), grads.get());
    Real* result = static_cast<Real*>(call.grad_value) + offset;
    for (int64_t row = 0; row < rows; ++row, result += stride)
      for (int64_t d = 0; d < dim; ++d) result[d] = pairs.get()[row * 2 * dim + dim + d];
  }
}

void forward(const Call& call, int64_t begin, int64_t end) {
  switch (call.storage) {
    case Storage::kFloat: return forward_of<float, float>(call, begin, end);
    case Storage::kDouble: return forward_of<double, double>(call, begin, end);
    case Storage::kBFloat16: return forward_of<float, BFloat16>(call, begin, end);
    case Storage::kHalf: return forward_of<float, Half>(call, begin, end);
  }
}

void backward(const Call& call, int64_t begin, int64_t end) {
  call.storage == Storage::kDouble ? backward_of<double>(call, begin, end) : backward_of<float>(call, begin, end);
}

}  // namespace
}  // namespace deform_attn
