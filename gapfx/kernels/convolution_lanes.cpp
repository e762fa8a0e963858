// Where lanes and columns of a convolution read and write.

#include "convolution_lanes.h"

#include <algorithm>
#include <cstring>

namespace gapfx {
namespace convolution {

namespace {

// Counts through a grid, lane after lane.
struct Lane {
  int64_t image, at[kDims];

  Lane(int64_t index, const int64_t* grid) {
    for (int d = kDims; d-- > 0; index /= grid[d]) at[d] = index % grid[d];
    image = index;
  }

  void next(const int64_t* grid) {
    for (int d = kDims; d-- > 0;) {
      if (++at[d] < grid[d]) return;
      at[d] = 0;
    }
    ++image;
  }
};

inline void put_run(const float* from, int size, float* to) { std::memcpy(to, from, sizeof(float) * size); }
inline void put_run(const float* from, int size, uint16_t* to) {
  for (int i = 0; i < size; ++i) to[i] = to_bfloat16(from[i]);
}

inline void get_run(const float* from, int64_t size, float* to) { std::memcpy(to, from, sizeof(float) * size); }
inline void get_run(const uint16_t* from, int64_t size, float* to) {
  for (int64_t i = 0; i < size; ++i) to[i] = to_float(from[i]);
}

// What lies around the plane is zero already, and stays so.
template <typename T>
void pad_plane(const T* from, const int64_t* size, const Reading& reading, float* to) {
  const int64_t *low = reading.low, *padded = reading.padded;
  const int64_t width = std::min(size[2], padded[2] - low[2]);
  if (width <= 0) return;
  for (int64_t y = 0; y < std::min(size[0], padded[0] - low[0]); ++y)
    for (int64_t x = 0; x < std::min(size[1], padded[1] - low[1]); ++x) {
      const int64_t at[kDims] = {y + low[0], x + low[1], low[2]};
      get_run(from + (y * size[1] + x) * size[2], width, to + reading.offset(at));
    }
}

// Lanes at consecutive places go together where they are many.
constexpr int kFewRuns = 12;
// Channels whose lines are asked for before they are written: planes lie far apart.
constexpr int64_t kAhead = 6;

int runs_of(const int64_t* places, int count, Run* runs) {
  int found = 0;
  for (int lane = 0; lane < count; ++lane) {
    if (!lane || places[lane] != places[lane - 1] + 1) runs[found++] = Run{lane, 0, places[lane]};
    ++runs[found - 1].size;
  }
  return found;
}

template <typename T>
void write_as(const float* sums, int64_t channel, int64_t channels, const int64_t* places, int count,
              const Images& images) {
  const int64_t plane = images.plane();
  T* data = static_cast<T*>(images.data) + channel * plane;
  Run runs[kLanes];
  const int num_runs = runs_of(places, count, runs);
  for (int64_t c = 0; c < channels; ++c, sums += kLanes, data += plane) {
    if (num_runs > kFewRuns) {
      for (int lane = 0; lane < count; ++lane) put(sums[lane], data + places[lane]);
      continue;
    }
    for (int r = 0; r < num_runs; ++r) {
      T* to = data + runs[r].at;
      if (c + kAhead < channels)
        for (int i = 0; i < runs[r].size; i += 64 / static_cast<int>(sizeof(T)))
          __builtin_prefetch(to + kAhead * plane + i, 1);
      put_run(sums + runs[r].lane, runs[r].size, to);
    }
  }
}

}  // namespace

Reader::Reader(const Images& images, const Reading& reading) : images_(images), reading_(reading) {
  is_in_place_ = !images.is_bfloat16;
  for (int d = 0; d < kDims; ++d)
    is_in_place_ = is_in_place_ && reading.low[d] == 0 && reading.padded[d] == images.size[d];
  slots_ = (kLanes - 2) / reading.lanes_per_image() + 2;
  if (!is_in_place_) padded_.resize(slots_ * images.channels * reading.padded_plane());
}

void Reader::pad(int64_t image) {
  const int64_t from = images_.plane(), to = reading_.padded_plane();
  float* slot = padded_.data() + image % slots_ * images_.channels * to;
  for (int64_t c = 0; c < images_.channels; ++c) {
    const int64_t at = (image * images_.channels + c) * from;
    if (images_.is_bfloat16)
      pad_plane(static_cast<const uint16_t*>(images_.data) + at, images_.size, reading_, slot + c * to);
    else
      pad_plane(static_cast<const float*>(images_.data) + at, images_.size, reading_, slot + c * to);
  }
}

void Reader::set(int64_t first, int count, Panel* panel) {
  int64_t places[kLanes];
  Lane lane(first, reading_.grid);
  next_ = std::max(next_, lane.image);
  const int64_t between = images_.channels * reading_.padded_plane();
  for (int i = 0; i < count; ++i, lane.next(reading_.grid)) {
    if (!is_in_place_)
      for (; next_ <= lane.image; ++next_) pad(next_);
    int64_t at[kDims];
    for (int d = 0; d < kDims; ++d) at[d] = lane.at[d] * reading_.step[d];
    places[i] = (is_in_place_ ? lane.image : lane.image % slots_) * between + reading_.offset(at);
  }
  panel->set(places, count);
}

void write(const float* sums, int64_t channel, int64_t channels, const Reading& reading, const Writing& writing,
           const Images& images, int64_t first, int count) {
  int64_t places[kLanes];
  Lane lane(first, reading.grid);
  for (int i = 0; i < count; ++i, lane.next(reading.grid)) {
    int64_t place = 0;
    for (int d = 0; d < kDims; ++d) place = place * images.size[d] + lane.at[d] * writing.step[d] + writing.first[d];
    places[i] = lane.image * images.channels * images.plane() + place;
  }
  if (images.is_bfloat16)
    write_as<uint16_t>(sums, channel, channels, places, count, images);
  else
    write_as<float>(sums, channel, channels, places, count, images);
}

}  // namespace convolution
}  // namespace gapfx
