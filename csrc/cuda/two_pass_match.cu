#include <cfloat>

#include "kernels.h"
#include "launch.h"

namespace gs_d2 {

namespace {

// kThreads canonical boxes that a block shares.
struct BoxTile {
  alignas(16) Box box[kThreads];
  float area[kThreads];
};

struct Rows {
  int64_t begin, end;
};

__device__ __forceinline__ int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : (value > high ? high : value);
}

// The host cannot look at offsets without waiting for the device, so bad ones are made harmless here: they stay within
// the rows there are. An end before its begin means no rows.
__device__ __forceinline__ Rows rows_of_image(const int64_t* offsets, int64_t image, int64_t num_rows) {
  if (offsets == nullptr) return {0, num_rows};
  return {clamp(offsets[image], 0, num_rows), clamp(offsets[image + 1], 0, num_rows)};
}

// The bounds of the boxes of a warp's lanes, empty ones left out.
__device__ __forceinline__ Box warp_bounds(Box box, float area) {
  const bool valid = area > 0.0f;
  Box bounds{valid ? box.x1 : FLT_MAX, valid ? box.y1 : FLT_MAX, valid ? box.x2 : -FLT_MAX, valid ? box.y2 : -FLT_MAX};
  for (int d = kWarp / 2; d > 0; d /= 2) {
    bounds.x1 = min_of(bounds.x1, __shfl_xor_sync(kAllLanes, bounds.x1, d));
    bounds.y1 = min_of(bounds.y1, __shfl_xor_sync(kAllLanes, bounds.y1, d));
    bounds.x2 = max_of(bounds.x2, __shfl_xor_sync(kAllLanes, bounds.x2, d));
    bounds.y2 = max_of(bounds.y2, __shfl_xor_sync(kAllLanes, bounds.y2, d));
  }
  return bounds;
}

// Calls visit(k, box, area) for the boxes among boxes[rows] that touch the warp's bounds, k from 0 at rows.begin
// upwards. Every thread of the block must call it with the same rows.
template <class Visit>
__device__ __forceinline__ void visit_touching(const Box* boxes, Rows rows, Box bounds, BoxTile& tile, Visit visit) {
  for (int64_t first = rows.begin; first < rows.end; first += kThreads) {
    const int count = int(rows.end - first < kThreads ? rows.end - first : kThreads);
    __syncthreads();  // every warp is done with the tile before this one
    if (int(threadIdx.x) < count) {
      const Box box = canonical_box(boxes[first + threadIdx.x]);
      tile.box[threadIdx.x] = box;
      tile.area[threadIdx.x] = box_area(box);
    }
    __syncthreads();
    for (int part = 0; part < count; part += kWarp) {
      const int mine = part + int(threadIdx.x) % kWarp;
      unsigned hits = __ballot_sync(kAllLanes, mine < count && touches(tile.box[mine], bounds));
      for (; hits != 0; hits &= hits - 1) {
        const int k = part + __ffs(int(hits)) - 1;
        visit(first - rows.begin + k, tile.box[k], tile.area[k]);
      }
    }
  }
}

// offers[gt] = max(offers[gt], offer) over the lanes with an offer, one atomic for each ground truth that they name:
// all the anchors on one face would otherwise queue at one address.
__device__ __forceinline__ void raise_offers(uint64_t* offers, int32_t gt, uint64_t offer) {
  unsigned pending = __ballot_sync(kAllLanes, offer != kUnmatched);
  while (pending != 0) {
    const int speaker = __ffs(int(pending)) - 1;
    const int32_t named = __shfl_sync(kAllLanes, gt, speaker);
    const bool mine = offer != kUnmatched && gt == named;
    unsigned long long best = mine ? offer : kUnmatched;
    for (int d = kWarp / 2; d > 0; d /= 2) {
      const unsigned long long other = __shfl_xor_sync(kAllLanes, best, d);
      best = other > best ? other : best;
    }
    if (int(threadIdx.x) % kWarp == speaker) atomicMax(reinterpret_cast<unsigned long long*>(offers + named), best);
    pending &= ~__ballot_sync(kAllLanes, mine);
  }
}

__global__ void __launch_bounds__(kThreads) match_first_pass_kernel(const MatchBatch p) {
  __shared__ BoxTile tile;
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool exists = i < p.num_anchors;  // lanes without an anchor go along with an empty box
  for (int64_t image = blockIdx.y; image < p.num_images; image += gridDim.y) {
    const Box* anchors = p.anchors + (p.anchors_per_image ? image * p.num_anchors : 0);
    const Box anchor = exists ? canonical_box(anchors[i]) : Box{0.0f, 0.0f, 0.0f, 0.0f};
    const float area = box_area(anchor);
    const Box bounds = warp_bounds(anchor, area);

    float best_iou = 0.0f;
    int32_t best_gt = 0;
    const Rows gts = rows_of_image(p.gt_offsets, image, p.num_gts);
    visit_touching(p.gt_boxes, gts, bounds, tile, [&](int64_t j, Box gt, float gt_area) {
      const float inter = box_intersection(gt, anchor);
      if (!iou_may_exceed(inter, gt_area, area, best_iou)) return;
      const float iou = iou_of_areas(inter, gt_area, area);
      if (iou > best_iou) {  // strict: the lowest ground truth wins a tie
        best_iou = iou;
        best_gt = int32_t(j);
      }
    });

    int8_t label = first_pass_label(best_iou, p.low, p.high);
    if (p.second_pass != SecondPass::kNone) {
      const uint64_t offer = label == kPositive ? kTaken : pack_candidate(best_iou, uint32_t(i));
      raise_offers(p.offers + gts.begin, best_gt, exists && label != kNegative ? offer : kUnmatched);
    }
    const Rows ignores = rows_of_image(p.ignore_offsets, image, p.num_ignore_boxes);
    visit_touching(p.ignore_boxes, ignores, bounds, tile, [&](int64_t, Box ignore_box, float) {
      const float inter = box_intersection(ignore_box, anchor);
      if (label == kNegative && is_swallowed(inter, area, p.ignore_thresh)) label = kIgnored;
    });
    if (exists) {
      p.matched_idxs[image * p.num_anchors + i] = best_gt;
      p.match_labels[image * p.num_anchors + i] = label;
      p.max_ious[image * p.num_anchors + i] = best_iou;
    }
  }
}

// SecondPass::kBest: one thread per ground truth.
__global__ void __launch_bounds__(kThreads) match_promote_best_kernel(const MatchBatch p) {
  for (int64_t image = blockIdx.y; image < p.num_images; image += gridDim.y) {
    const Rows gts = rows_of_image(p.gt_offsets, image, p.num_gts);
    const int64_t j = gts.begin + int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (j >= gts.end || !is_candidate(p.offers[j])) continue;
    p.match_labels[image * p.num_anchors + candidate_anchor(p.offers[j])] = kPositive;
  }
}

// SecondPass::kAll: one thread per anchor.
__global__ void __launch_bounds__(kThreads) match_promote_all_kernel(const MatchBatch p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.num_anchors) return;
  for (int64_t image = blockIdx.y; image < p.num_images; image += gridDim.y) {
    const int64_t at = image * p.num_anchors + i;
    if (first_pass_label(p.max_ious[at], p.low, p.high) != kIgnored) continue;
    const Rows gts = rows_of_image(p.gt_offsets, image, p.num_gts);
    if (is_candidate(p.offers[gts.begin + p.matched_idxs[at]])) p.match_labels[at] = kPositive;
  }
}

}  // namespace

cudaError_t launch_two_pass_match(const MatchBatch& p, cudaStream_t stream) {
  if (p.num_images == 0 || p.num_anchors == 0) return cudaSuccess;
  const unsigned rows = unsigned(p.num_images < kMaxGridY ? p.num_images : kMaxGridY);
  const dim3 per_anchor(unsigned(ceil_div(p.num_anchors, kThreads)), rows);
  const dim3 per_gt(unsigned(ceil_div(p.num_gts, kThreads)), rows);
  const bool second_pass = p.second_pass != SecondPass::kNone && p.num_gts > 0;
  if (second_pass) {
    const cudaError_t error = cudaMemsetAsync(p.offers, 0, size_t(p.num_gts) * sizeof(uint64_t), stream);
    if (error != cudaSuccess) return error;
  }
  GS_LAUNCH(match_first_pass_kernel, per_anchor, dim3(kThreads), 0, stream, p);
  if (second_pass && p.second_pass == SecondPass::kBest) {
    GS_LAUNCH(match_promote_best_kernel, per_gt, dim3(kThreads), 0, stream, p);
  } else if (second_pass) {
    GS_LAUNCH(match_promote_all_kernel, per_anchor, dim3(kThreads), 0, stream, p);
  }
  return cudaGetLastError();
}

}  // namespace gs_d2
