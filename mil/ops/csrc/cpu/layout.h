// What the CPU kernels have to know beside the tensors: where the points of each bag look, and who may add to which rows.
#pragma once
#include <algorithm>
#include <numeric>

#include "../problem.h"
#include "call.h"

namespace deform_attn {
namespace {

// For each bag the map of every point of a query, padded to whole blocks with maps of size 0.
class PointTables {
 public:
  explicit PointTables(const Problem& p) {
    const int64_t padded = (p.heads * p.points + kBlock - 1) / kBlock * kBlock;
    numbers_.assign(static_cast<size_t>(3 * p.bags * padded), 0);
    int32_t* to = numbers_.data();
    int64_t start = 0;
    for (int64_t bag = 0; bag < p.bags; ++bag, to += 3 * padded) {
      views.push_back({to, to + padded, to + 2 * padded});
      int64_t point = 0;
      for (int64_t level = 0; level < p.levels; ++level) {
        const int64_t height = p.shapes[2 * (bag * p.levels + level)], width = p.shapes[2 * (bag * p.levels + level) + 1];
        for (int64_t i = 0; i < p.points_per_level[static_cast<size_t>(level)]; ++i, ++point)
          for (int64_t head = 0; head < p.heads; ++head) {
            int32_t* at = to + head * p.points + point;
            at[0] = static_cast<int32_t>(width), at[padded] = static_cast<int32_t>(height);
            at[2 * padded] = static_cast<int32_t>(start);
          }
        start += height * width;
      }
    }
  }

  std::vector<Points> views;

 private:
  std::vector<int32_t> numbers_;
};

// Smallest and one more than the largest row that cells [begin, end) name; (rows, 0) where they name none.
inline std::pair<int64_t, int64_t> range_of(const int32_t* maps, int64_t begin, int64_t end, int64_t rows) {
  constexpr int64_t kGrain = int64_t{1} << 18;
  const int64_t parts = (end - begin + kGrain - 1) / kGrain;
  std::vector<std::pair<int32_t, int32_t>> found(static_cast<size_t>(parts));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      uint32_t least = 0xffffffffu;  // -1 is the largest unsigned number
      int32_t most = -1, below = 0;
      const int64_t stop = std::min(begin + (part + 1) * kGrain, end);
      for (int64_t i = begin + part * kGrain; i < stop; ++i) {
        const int32_t row = maps[i];
        least = std::min(least, static_cast<uint32_t>(row));
        most = std::max(most, row);
        below |= row < -1;
      }
      found[static_cast<size_t>(part)] = {below ? -2 : static_cast<int32_t>(least), most};
    }
  });
  int64_t least = rows, most = -1;
  for (const auto& [low, high] : found) {
    STD_TORCH_CHECK(low >= -1 && high < rows, "sparse_deform_attn: a map names row ", low < -1 ? low : high,
                    ", value has rows 0 to ", rows - 1);
    if (high >= 0) least = std::min<int64_t>(least, low), most = std::max<int64_t>(most, high);
  }
  return {least, most + 1};
}

// Maps whose rows do not interleave are sections of their own; those that share rows are one section, in their own order.
class Sections {
 public:
  Sections(const Problem& p, const int32_t* maps) {
    std::vector<Section> ranges;
    std::vector<Map> all;
    int64_t start = 0;
    for (int64_t bag = 0; bag < p.bags; ++bag) {
      int64_t point = 0;
      for (int64_t level = 0; level < p.levels; ++level) {
        const int64_t height = p.shapes[2 * (bag * p.levels + level)], width = p.shapes[2 * (bag * p.levels + level) + 1];
        const int64_t points = p.points_per_level[static_cast<size_t>(level)];
        const auto [first, end] = range_of(maps, start, start + height * width, p.rows);
        ranges.push_back({std::min(first, end), end, 0, 0});
        all.push_back({static_cast<int32_t>(height), static_cast<int32_t>(width), static_cast<int32_t>(start),
                       bag == 0 ? 0 : p.bag_end[static_cast<size_t>(bag - 1)], p.bag_end[static_cast<size_t>(bag)], point, points});
        point += points;
        start += height * width;
      }
    }
    merge(ranges, all);
  }

  bool cover(int64_t rows) const {
    return rows == std::accumulate(sections.begin(), sections.end(), int64_t{0},
                                   [](int64_t sum, const Section& s) { return sum + s.end - s.first; });
  }

  std::vector<Section> sections;
  std::vector<Map> maps;

 private:
  void merge(const std::vector<Section>& ranges, const std::vector<Map>& all) {
    std::vector<size_t> order(ranges.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return ranges[a].first < ranges[b].first; });
    for (const size_t i : order) {
      const int64_t at = static_cast<int64_t>(maps.size());
      maps.push_back(all[i]);
      if (!sections.empty() && ranges[i].first < sections.back().end) {
        sections.back().end = std::max(sections.back().end, ranges[i].end);
        sections.back().end_map = at + 1;
      } else {
        sections.push_back({ranges[i].first, ranges[i].end, at, at + 1});
      }
    }
  }
};

}  // namespace
}  // namespace deform_attn
