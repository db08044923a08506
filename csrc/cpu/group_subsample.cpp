#include <algorithm>
#include <cstring>

#include "../math/philox.h"
#include "instruction_set.h"
#include "kernels.h"

namespace gs_d2 {

namespace {

constexpr int64_t kChunk = kSubsampleChunk;
static_assert(kChunk % 8 == 0, "whole quads of draws, whole words of marks");

// The bits of anchors begin to begin + count, begin a multiple of 4; writes up to the next multiple of 4.
inline __attribute__((always_inline)) void draw_chunk(uint64_t seed, uint32_t image_idx, uint32_t begin, int64_t count,
                                                      uint32_t* bits) {
  for (int64_t quad = 0; quad < (count + 3) / 4; ++quad) {
    const PhiloxWords words = draw_bits_of_quad(seed, image_idx, begin / 4 + uint32_t(quad));
    bits[4 * quad] = words.x0;
    bits[4 * quad + 1] = words.x1;
    bits[4 * quad + 2] = words.x2;
    bits[4 * quad + 3] = words.x3;
  }
}

inline __attribute__((always_inline)) void random_keys_body(uint64_t seed, uint32_t image_idx, uint32_t begin,
                                                            int64_t count, uint32_t* keys) {
  draw_chunk(seed, image_idx, begin, count, keys);
  for (int64_t k = 0; k < count; ++k) keys[k] = random_key(keys[k]);
}

GS_MULTIVERSION(random_keys, (uint64_t seed, uint32_t image_idx, uint32_t begin, int64_t count, uint32_t* keys),
                (seed, image_idx, begin, count, keys))

inline __attribute__((always_inline)) void wrs_keys_body(uint64_t seed, uint32_t image_idx, uint32_t begin,
                                                         const float* losses, int64_t count, uint32_t* keys) {
  draw_chunk(seed, image_idx, begin, count, keys);
  for (int64_t k = 0; k < count; ++k) keys[k] = wrs_key(keys[k], losses[k]);
}

GS_MULTIVERSION(wrs_keys,
                (uint64_t seed, uint32_t image_idx, uint32_t begin, const float* losses, int64_t count, uint32_t* keys),
                (seed, image_idx, begin, losses, count, keys))

inline __attribute__((always_inline)) void ohem_keys_body(const float* losses, int64_t count, uint32_t* keys) {
  for (int64_t k = 0; k < count; ++k) keys[k] = ohem_key(losses[k]);
}

GS_MULTIVERSION(ohem_keys, (const float* losses, int64_t count, uint32_t* keys), (losses, count, keys))

void sort_keys(const SubsampleProblem& p, int64_t begin, int64_t count, uint32_t* keys) {
  switch (p.method) {
    case SampleMethod::kRandom:
      return random_keys(p.seed, p.image_idx, uint32_t(begin), count, keys);
    case SampleMethod::kWrs:
      return wrs_keys(p.seed, p.image_idx, uint32_t(begin), p.losses + begin, count, keys);
    case SampleMethod::kOhem:
    case SampleMethod::kOhemAll:
      return ohem_keys(p.losses + begin, count, keys);
  }
}

// Which anchors can still be sampled: positives, and negatives whose key is within the bounds of all groups.
inline __attribute__((always_inline)) void mark_rivals_body(const int8_t* labels, const uint32_t* keys, int64_t count,
                                                            uint32_t negative_bound, uint8_t* rivals) {
  for (int64_t k = 0; k < count; ++k) {
    const bool negative = (labels[k] == kNegative) & (keys[k] <= negative_bound);
    rivals[k] = negative | (labels[k] == kPositive);
  }
}

GS_MULTIVERSION(mark_rivals,
                (const int8_t* labels, const uint32_t* keys, int64_t count, uint32_t negative_bound, uint8_t* rivals),
                (labels, keys, count, negative_bound, rivals))

// Leaves the `count` smallest keys, the largest of them last. 1 <= count <= keys.size().
//
// It does what std::nth_element does, with fewer branches that are mispredicted: a histogram tells which bin holds the
// last of them, and only the keys of that bin are compared with each other.
void keep_smallest(std::vector<uint64_t>& keys, int64_t count) {
  constexpr int kBinBits = 9;
  const auto [least, most] = std::minmax_element(keys.begin(), keys.end());
  const uint64_t min = *least;
  int shift = 0;
  while ((*most - min) >> shift >> kBinBits != 0) ++shift;
  uint32_t sizes[1 << kBinBits] = {};
  for (const uint64_t key : keys) ++sizes[(key - min) >> shift];
  uint64_t bin = 0;
  int64_t below = 0;
  while (below + sizes[bin] < count) below += sizes[bin++];

  std::vector<uint64_t> in_bin(sizes[bin] + 1);  // one more for what the last steps write and do not count
  int64_t num_kept = 0, num_in_bin = 0;
  for (const uint64_t key : keys) {
    const uint64_t of_key = (key - min) >> shift;
    keys[num_kept] = key;
    num_kept += of_key < bin;
    in_bin[num_in_bin] = key;
    num_in_bin += of_key == bin;
  }
  const auto last = in_bin.begin() + (count - below);
  std::nth_element(in_bin.begin(), last - 1, in_bin.end() - 1);
  std::copy(in_bin.begin(), last, keys.begin() + below);
  keys.resize(count);
}

// Keeps the `capacity` smallest of the keys pushed into it.
class SmallestKeys {
 public:
  explicit SmallestKeys(int64_t capacity) : capacity_(capacity), bound_(capacity > 0 ? ~uint64_t{0} : 0) {
  }

  void push(uint64_t key) {
    if (key >= bound_) return;
    keys_.push_back(key);
    if (int64_t(keys_.size()) >= 2 * capacity_ + 64) shrink();
  }

  // Keys above this, without their index, are never kept.
  uint32_t bound() const {
    return uint32_t(bound_ >> 32);
  }

  std::vector<uint64_t> take() {
    shrink();
    return std::move(keys_);
  }

 private:
  void shrink() {
    if (int64_t(keys_.size()) <= capacity_) return;
    keep_smallest(keys_, capacity_);
    bound_ = keys_.back();
  }

  int64_t capacity_;
  uint64_t bound_;
  std::vector<uint64_t> keys_;
};

}  // namespace

Reservoirs cpu_subsample_collect(const SubsampleProblem& p, int64_t chunk_begin, int64_t chunk_end) {
  const int64_t begin = chunk_begin * kChunk;
  const int64_t end = std::min(chunk_end * kChunk, p.num_anchors);
  std::vector<SmallestKeys> segments;
  segments.reserve(2 * p.num_groups);
  for (int64_t g = 0; g < p.num_groups; ++g) {
    segments.emplace_back(p.quota.num_per_group);  // negatives may have to fill the whole group
    segments.emplace_back(p.quota.max_positives);
  }
  std::memset(p.sampled_labels + begin, kIgnored, size_t(end - begin));
  uint32_t keys[kChunk];
  uint8_t rivals[kChunk];
  uint32_t negative_bound = ~uint32_t{0};  // falls as the groups fill up; then few anchors need a closer look
  for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
    const int64_t count = std::min(kChunk, end - chunk);
    sort_keys(p, chunk, count, keys);
    std::memset(rivals + count / 8 * 8, 0, size_t(kChunk - count / 8 * 8));  // the last word may be partial
    mark_rivals(p.match_labels + chunk, keys, count, negative_bound, rivals);
    for (int64_t word = 0; word < count; word += 8) {
      uint64_t eight;
      std::memcpy(&eight, rivals + word, sizeof eight);
      for (; eight != 0; eight &= eight - 1) {  // by its bytes of 1, few of which there are
        const int64_t k = word + __builtin_ctzll(eight) / 8;
        const int64_t i = chunk + k;
        const int64_t group = p.group_idxs[i];
        if (group >= 0 && group < p.num_groups) {
          segments[segment_idx(p.method, group, p.match_labels[i])].push(sort_key(keys[k], uint32_t(i)));
        }
      }
    }
    negative_bound = 0;
    for (int64_t g = 0; g < p.num_groups; ++g) {
      negative_bound = std::max(negative_bound, segments[2 * g + kNegative].bound());
    }
  }
  Reservoirs reservoirs;
  reservoirs.reserve(segments.size());
  for (SmallestKeys& segment : segments) reservoirs.push_back(segment.take());
  return reservoirs;
}

void cpu_subsample_draw(const SubsampleProblem& p, Reservoirs& reservoirs, int64_t group_begin, int64_t group_end) {
  const auto draw = [&](std::vector<uint64_t>& candidates, int64_t wanted) {
    const int64_t drawn = std::min(int64_t(candidates.size()), wanted);
    if (drawn > 0 && drawn < int64_t(candidates.size())) keep_smallest(candidates, drawn);
    for (int64_t k = 0; k < drawn; ++k) {
      const uint32_t i = uint32_t(candidates[k]);
      p.sampled_labels[i] = p.match_labels[i];
    }
    return drawn;
  };
  for (int64_t g = group_begin; g < group_end; ++g) {
    const int64_t num_positives = draw(reservoirs[2 * g + kPositive], p.quota.max_positives);
    draw(reservoirs[2 * g + kNegative], p.quota.num_per_group - num_positives);
  }
}

}  // namespace gs_d2
