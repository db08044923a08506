// Per image and segment (math/reservoir.h) the smallest sort keys win. Instead of sorting: a histogram of the keys
// finds the bin in which the last winner lies; everything below it wins at once, and only the rivals inside that bin
// are ordered.
#include "../math/philox.h"
#include "kernels.h"
#include "launch.h"

namespace gs_d2 {

namespace {

constexpr uint32_t kBins = 1024;
constexpr uint32_t kMaxListed =
    4096;  // rivals that a segment's list holds; with more, their anchors are searched again
constexpr int64_t kMaxScratch = int64_t{1} << 26;
constexpr int kWarps = kThreads / kWarp;

// What the histogram of a segment leaves to decide.
struct Threshold {
  uint32_t bin;         // keys of lower bins win
  uint32_t places;      // and this many of those in the bin itself, 0 if none
  uint32_t num_rivals;  // that compete for them
};

// Scratch of a launch, segments of all images one after another.
struct Scratch {
  uint32_t* histograms;    // [segments, kBins]
  uint32_t* list_lengths;  // [segments]
  Threshold* thresholds;   // [segments]
  uint32_t* lists;         // [segments, kMaxListed]: indices of the rivals, in any order
};

constexpr int64_t kBytesPerSegment = (kBins + 1 + kMaxListed) * sizeof(uint32_t) + sizeof(Threshold);

__device__ __forceinline__ int64_t segment_of(const SubsampleBatch& p, int64_t image, int64_t i) {
  const int8_t label = p.match_labels[image * p.num_anchors + i];
  if (label != kNegative && label != kPositive) return -1;
  const int64_t group = p.group_idxs[(p.groups_per_image ? image * p.num_anchors : 0) + i];
  return group >= 0 && group < p.num_groups ? segment_idx(p.method, group, label) : -1;
}

__device__ __forceinline__ uint32_t key_of(const SubsampleBatch& p, int64_t image, int64_t i) {
  const int64_t at = image * p.num_anchors + i;
  if (is_ohem(p.method)) return ohem_key(p.losses[at]);
  const uint64_t seed = uint64_t(p.seed_tensor != nullptr ? *p.seed_tensor : p.seed);
  const uint32_t bits = draw_bits(seed, uint32_t(p.first_image + image), uint32_t(i));
  return p.method == SampleMethod::kWrs ? wrs_key(bits, p.losses[at]) : random_key(bits);
}

// Rises with the key. Only wrs and ohem keys are floats, and none of theirs lies far outside the bins: wrs keys are in
// [2^-53, 2^25], ohem losses at most 1e6. What does joins the first or last bin, which is slower, not wrong.
__device__ __forceinline__ uint32_t bin_of(SampleMethod method, uint32_t key) {
  if (method == SampleMethod::kRandom) return key >> 22;
  const uint32_t lowest = method == SampleMethod::kWrs ? (127 - 54) << 3 : (~0x49742400u) >> 20;
  const uint32_t bin = key >> 20;
  return bin < lowest ? 0 : (bin - lowest < kBins ? bin - lowest : kBins - 1);
}

__global__ void __launch_bounds__(kThreads) subsample_histogram_kernel(const SubsampleBatch p, const Scratch scratch) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t image = blockIdx.y;
  const int64_t segment = i < p.num_anchors ? segment_of(p, image, i) : -1;
  constexpr uint32_t kNowhere = ~0u;
  const uint32_t slot = segment < 0 ? kNowhere : uint32_t(segment) * kBins + bin_of(p.method, key_of(p, image, i));
  // One atomic for the lanes that share a counter: where all keys are alike, all would wait for the same one.
  const unsigned peers = __match_any_sync(kAllLanes, slot);
  if (slot != kNowhere && int(threadIdx.x) % kWarp == __ffs(int(peers)) - 1) {
    atomicAdd(scratch.histograms + image * 2 * p.num_groups * kBins + slot, uint32_t(__popc(peers)));
  }
}

// The sum of `value` over this thread and those before it. Every thread of the block must call it.
__device__ __forceinline__ uint32_t block_inclusive_sum(uint32_t value, uint32_t (&warp_sums)[kWarps]) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  for (int d = 1; d < kWarp; d *= 2) {
    const uint32_t before = __shfl_up_sync(kAllLanes, value, d);
    if (lane >= d) value += before;
  }
  if (lane == kWarp - 1) warp_sums[warp] = value;
  __syncthreads();
  for (int w = 0; w < warp; ++w) value += warp_sums[w];
  return value;
}

// One block per (group, image): positives first, negatives fill the rest of the group.
__global__ void __launch_bounds__(kThreads) subsample_threshold_kernel(const SubsampleBatch p, const Scratch scratch) {
  __shared__ uint32_t warp_sums[kWarps];
  __shared__ uint32_t total;
  constexpr int kOwn = kBins / kThreads;  // consecutive bins of a thread
  int64_t wanted = p.quota.max_positives;
  for (int label = kPositive; label >= kNegative; --label) {
    const int64_t segment = (int64_t(blockIdx.y) * p.num_groups + blockIdx.x) * 2 + label;
    const uint32_t* counts = scratch.histograms + segment * kBins + threadIdx.x * kOwn;
    uint32_t own = 0;
    for (int k = 0; k < kOwn; ++k) own += counts[k];
    const uint32_t up_to = block_inclusive_sum(own, warp_sums);

    // The bin that the last of `wanted` falls into, if there are that many: exactly one thread finds it.
    int64_t below = up_to - own;
    for (int k = 0; k < kOwn; ++k) {
      const int64_t places = wanted - below;
      below += counts[k];
      if (places <= 0 || wanted > below) continue;
      const uint32_t bin = threadIdx.x * kOwn + k;
      const bool all_win = places == counts[k];
      scratch.thresholds[segment] = all_win ? Threshold{bin + 1, 0, 0} : Threshold{bin, uint32_t(places), counts[k]};
    }
    if (threadIdx.x == kThreads - 1) {
      if (wanted <= 0) scratch.thresholds[segment] = {0, 0, 0};
      if (wanted > up_to) scratch.thresholds[segment] = {kBins, 0, 0};
      total = up_to;
    }
    __syncthreads();
    wanted = p.quota.num_per_group - (total < wanted ? total : wanted);  // as many negatives, after the positives
  }
}

__global__ void __launch_bounds__(kThreads) subsample_draw_kernel(const SubsampleBatch p, const Scratch scratch) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t image = blockIdx.y;
  if (i >= p.num_anchors) return;
  int8_t sampled = kIgnored;
  const int64_t segment = segment_of(p, image, i);
  if (segment >= 0) {
    const int64_t at = image * 2 * p.num_groups + segment;
    const Threshold threshold = scratch.thresholds[at];
    const uint32_t bin = bin_of(p.method, key_of(p, image, i));
    if (bin < threshold.bin) sampled = p.match_labels[image * p.num_anchors + i];
    if (bin == threshold.bin && threshold.num_rivals > 0 && threshold.num_rivals <= kMaxListed) {
      scratch.lists[at * kMaxListed + atomicAdd(scratch.list_lengths + at, 1u)] = uint32_t(i);
    }
  }
  p.sampled_labels[image * p.num_anchors + i] = sampled;
}

// One block per (segment, image): the places of the threshold bin, by 8 bits of the sort key after another.
__global__ void __launch_bounds__(kThreads) subsample_select_kernel(const SubsampleBatch p, const Scratch scratch) {
  __shared__ uint32_t warp_sums[kWarps];
  __shared__ uint32_t counts[kThreads];
  __shared__ struct {
    uint32_t digit, below, count;
  } chosen;
  static_assert(kThreads == 256, "a thread for each value of a digit");
  const int64_t segment = blockIdx.x, image = blockIdx.y;
  const int64_t at = image * 2 * p.num_groups + segment;
  const Threshold threshold = scratch.thresholds[at];
  if (threshold.places == 0) return;

  // Calls visit(anchor, key) on this thread's share of the rivals.
  const bool listed = threshold.num_rivals <= kMaxListed;
  const auto for_each_rival = [&](auto visit) {
    const int64_t size = listed ? int64_t(threshold.num_rivals) : p.num_anchors;
    for (int64_t k = threadIdx.x; k < size; k += kThreads) {
      const int64_t i = listed ? int64_t(scratch.lists[at * kMaxListed + k]) : k;
      if (segment_of(p, image, i) != segment) continue;
      const uint32_t key = key_of(p, image, i);
      if (bin_of(p.method, key) == threshold.bin) visit(i, sort_key(key, uint32_t(i)));
    }
  };

  // Sort keys that agree with `prefix` in the bits of `decided` are still open, lower ones have won.
  uint64_t prefix = 0, decided = 0;
  uint32_t places = threshold.places;
  for (int shift = 56; shift >= 0; shift -= 8) {
    counts[threadIdx.x] = 0;
    __syncthreads();
    for_each_rival([&](int64_t, uint64_t key) {
      if ((key & decided) == prefix) atomicAdd(&counts[(key >> shift) & 0xff], 1u);
    });
    __syncthreads();
    const uint32_t count = counts[threadIdx.x];
    const uint32_t up_to = block_inclusive_sum(count, warp_sums);
    if (up_to - count < places && places <= up_to) chosen = {threadIdx.x, up_to - count, count};
    __syncthreads();
    prefix |= uint64_t{chosen.digit} << shift;
    decided |= uint64_t{0xff} << shift;
    places -= chosen.below;
    if (chosen.count == places) break;  // all that are still open win; no two sort keys are equal, so this comes
  }
  for_each_rival([&](int64_t i, uint64_t key) {
    const int64_t of_batch = image * p.num_anchors + i;
    if ((key & decided) <= prefix) p.sampled_labels[of_batch] = p.match_labels[of_batch];
  });
}

// Images of one set of launches: as many as the grid and a bounded scratch allow.
int64_t images_per_launch(int64_t num_images, int64_t num_groups) {
  const int64_t fitting = kMaxScratch / (2 * num_groups * kBytesPerSegment);
  const int64_t images = num_images < fitting ? num_images : fitting;
  return images < 1 ? 1 : (images < kMaxGridY ? images : kMaxGridY);
}

}  // namespace

int64_t group_subsample_scratch_bytes(int64_t num_images, int64_t num_groups) {
  return images_per_launch(num_images, num_groups) * 2 * num_groups * kBytesPerSegment;
}

cudaError_t launch_group_subsample(const SubsampleBatch& batch, void* memory, cudaStream_t stream) {
  if (batch.num_anchors == 0) return cudaSuccess;
  const int64_t step = images_per_launch(batch.num_images, batch.num_groups);
  for (int64_t first = 0; first < batch.num_images; first += step) {
    SubsampleBatch p = batch;
    p.num_images = batch.num_images - first < step ? batch.num_images - first : step;
    p.first_image += first;
    p.match_labels += first * p.num_anchors;
    p.group_idxs += p.groups_per_image ? first * p.num_anchors : 0;
    p.losses += p.losses != nullptr ? first * p.num_anchors : 0;
    p.sampled_labels += first * p.num_anchors;

    const int64_t segments = p.num_images * 2 * p.num_groups;
    Scratch scratch;
    scratch.histograms = static_cast<uint32_t*>(memory);
    scratch.list_lengths = scratch.histograms + segments * kBins;
    scratch.thresholds = reinterpret_cast<Threshold*>(scratch.list_lengths + segments);
    scratch.lists = reinterpret_cast<uint32_t*>(scratch.thresholds + segments);
    // Histograms and list lengths lie side by side and start at 0.
    const cudaError_t error = cudaMemsetAsync(memory, 0, size_t(segments) * (kBins + 1) * sizeof(uint32_t), stream);
    if (error != cudaSuccess) return error;
    const unsigned images = unsigned(p.num_images), groups = unsigned(p.num_groups);
    const dim3 per_anchor(unsigned(ceil_div(p.num_anchors, kThreads)), images);
    GS_LAUNCH(subsample_histogram_kernel, per_anchor, dim3(kThreads), 0, stream, p, scratch);
    GS_LAUNCH(subsample_threshold_kernel, dim3(groups, images), dim3(kThreads), 0, stream, p, scratch);
    GS_LAUNCH(subsample_draw_kernel, per_anchor, dim3(kThreads), 0, stream, p, scratch);
    GS_LAUNCH(subsample_select_kernel, dim3(2 * groups, images), dim3(kThreads), 0, stream, p, scratch);
  }
  return cudaGetLastError();
}

}  // namespace gs_d2
