// Distributes passes over maps among threads: by image, group of channels and vector of channels.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "fusion.h"
#include "tokens.h"
#include "vec.h"

namespace spatial_mamba {

// A batch of maps, the neighbours that fusion reads in them, and a ring of the rows that are needed at a time.
struct Map : Shape {
  Map(const Shape& shape, at::IntArrayRef offsets)
      : Shape(shape),
        around(offsets, height, width),
        ring{around.rows(), width, around.column_reach},
        taps_of_rows(find_taps(around, ring, height)) {}

  Neighbourhood around;
  RingLayout ring;
  std::vector<Taps> taps_of_rows;
};

// The weights of the taps, (T, dim) in memory, for one vector of channels.
template <typename T>
Vectors<T> load_taps(const Map& map, const T* taps, int64_t channel, int lanes) {
  Vectors<T> weights(map.around.size());
  for (int64_t t = 0; t < map.around.size(); ++t) weights[t] = load(taps + t * map.dim + channel, lanes);
  return weights;
}

// Groups of channels per image: just enough to keep all threads busy, because each group has its own copy of the
// gradients that its channels add to.
template <typename T>
int64_t channel_groups(const Map& map) {
  return parts_per_image(map.batch, map.chunks<T>());
}

// Runs a pass over every vector of channels of every image; make(b, channel, group) starts one. A pass takes one step
// per row, and some more until fusion has read all neighbours of the last row.
template <typename T, typename Make>
void run_passes(const Map& map, int64_t groups, Make&& make) {
  for_items(map.batch * groups, 1, [&](int64_t item) {
    const int64_t b = item / groups, group = item % groups;
    const int64_t last = (group + 1) * map.chunks<T>() / groups;
    for (int64_t chunk = group * map.chunks<T>() / groups; chunk < last; ++chunk) {
      auto pass = make(b, chunk * kLanes<T>, group);
      for (int64_t step = 0; step < map.height + map.around.row_reach; ++step) pass.advance(step);
      pass.finish();
    }
  });
}

}  // namespace spatial_mamba
