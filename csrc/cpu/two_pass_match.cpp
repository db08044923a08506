#include <cfloat>
#include <cstring>

#include "instruction_set.h"
#include "kernels.h"

namespace gs_d2 {

namespace {

// A block of consecutive anchors: on a grid they are neighbours, so most boxes miss the block's bounds and are skipped.
struct AnchorBlock {
  alignas(64) float x1[kMatchBlock], y1[kMatchBlock], x2[kMatchBlock], y2[kMatchBlock], area[kMatchBlock];
  alignas(64) float best_iou[kMatchBlock];
  alignas(64) int32_t best_gt[kMatchBlock];
  alignas(64) int32_t label[kMatchBlock];
};

// Bounds of the boxes as they are: at least those of the boxes that can match. NaN never replaces a bound.
inline __attribute__((always_inline)) void bound_block_body(const Box* anchors, int64_t count, Box& bounds) {
  Box low{FLT_MAX, FLT_MAX, FLT_MAX, FLT_MAX}, high{-FLT_MAX, -FLT_MAX, -FLT_MAX, -FLT_MAX};
  for (int64_t k = 0; k < count; ++k) {
    const Box box = anchors[k];
    low = {min_of(box.x1, low.x1), min_of(box.y1, low.y1), min_of(box.x2, low.x2), min_of(box.y2, low.y2)};
    high = {max_of(box.x1, high.x1), max_of(box.y1, high.y1), max_of(box.x2, high.x2), max_of(box.y2, high.y2)};
  }
  bounds = {low.x1, low.y1, high.x2, high.y2};
}

GS_MULTIVERSION(bound_block, (const Box* anchors, int64_t count, Box& bounds), (anchors, count, bounds))

inline __attribute__((always_inline)) void load_block_body(const Box* anchors, int64_t count, AnchorBlock& block) {
  for (int64_t k = 0; k < count; ++k) {
    const Box box = canonical_box(anchors[k]);
    block.x1[k] = box.x1;
    block.y1[k] = box.y1;
    block.x2[k] = box.x2;
    block.y2[k] = box.y2;
    block.area[k] = box_area(box);
  }
  // A last, partial block is filled up with empty boxes so that every loop has the same length.
  for (int64_t k = count; k < kMatchBlock; ++k) {
    block.x1[k] = block.y1[k] = block.x2[k] = block.y2[k] = block.area[k] = 0.0f;
  }
  for (int64_t k = 0; k < kMatchBlock; ++k) {
    block.best_iou[k] = 0.0f;
    block.best_gt[k] = 0;
  }
}

GS_MULTIVERSION(load_block, (const Box* anchors, int64_t count, AnchorBlock& block), (anchors, count, block))

// Lanes that are divided together: division is the slowest step, and most lanes need none.
constexpr int64_t kLanes = 16;

inline __attribute__((always_inline)) void match_gt_body(Box gt, int32_t gt_idx, AnchorBlock& block) {
  const float gt_area = box_area(gt);
  alignas(16) uint8_t rises[kMatchBlock];
  for (int64_t k = 0; k < kMatchBlock; ++k) {
    const float inter = box_intersection(gt, {block.x1[k], block.y1[k], block.x2[k], block.y2[k]});
    rises[k] = iou_may_exceed(inter, gt_area, block.area[k], block.best_iou[k]);
  }
  for (int64_t first = 0; first < kMatchBlock; first += kLanes) {
    uint64_t any[kLanes / 8];
    std::memcpy(any, rises + first, sizeof any);
    if ((any[0] | any[1]) == 0) continue;
    for (int64_t k = first; k < first + kLanes; ++k) {
      const float inter = box_intersection(gt, {block.x1[k], block.y1[k], block.x2[k], block.y2[k]});
      const float iou = iou_of_areas(inter, gt_area, block.area[k]);
      const bool better = iou > block.best_iou[k];  // strict: the lowest ground truth wins a tie
      block.best_iou[k] = better ? iou : block.best_iou[k];
      block.best_gt[k] = better ? gt_idx : block.best_gt[k];
    }
  }
}

GS_MULTIVERSION(match_gt, (Box gt, int32_t gt_idx, AnchorBlock& block), (gt, gt_idx, block))

inline __attribute__((always_inline)) void label_block_body(float low, float high, AnchorBlock& block, bool& any) {
  int32_t not_negative = 0;
  for (int64_t k = 0; k < kMatchBlock; ++k) {
    block.label[k] = first_pass_label(block.best_iou[k], low, high);
    not_negative |= block.label[k];
  }
  any = not_negative != 0;
}

GS_MULTIVERSION(label_block, (float low, float high, AnchorBlock& block, bool& any), (low, high, block, any))

inline __attribute__((always_inline)) void ignore_in_block_body(Box ignore_box, float thresh, AnchorBlock& block) {
  for (int64_t k = 0; k < kMatchBlock; ++k) {
    const float inter = box_intersection(ignore_box, {block.x1[k], block.y1[k], block.x2[k], block.y2[k]});
    const bool swallowed = is_swallowed(inter, block.area[k], thresh) & (block.label[k] == kNegative);
    block.label[k] = swallowed ? kIgnored : block.label[k];
  }
}

GS_MULTIVERSION(ignore_in_block, (Box ignore_box, float thresh, AnchorBlock& block), (ignore_box, thresh, block))

inline __attribute__((always_inline)) void store_block_body(const AnchorBlock& block, int64_t count,
                                                            int64_t* matched_idxs, int8_t* match_labels,
                                                            float* max_ious) {
  for (int64_t k = 0; k < count; ++k) matched_idxs[k] = block.best_gt[k];
  for (int64_t k = 0; k < count; ++k) match_labels[k] = int8_t(block.label[k]);
  for (int64_t k = 0; k < count; ++k) max_ious[k] = block.best_iou[k];
}

GS_MULTIVERSION(store_block,
                (const AnchorBlock& block, int64_t count, int64_t* matched_idxs, int8_t* match_labels, float* max_ious),
                (block, count, matched_idxs, match_labels, max_ious))

// offers[gt] = max(offers[gt], offer); the order of calls does not matter.
void raise_offer(uint64_t* offers, int64_t gt, uint64_t offer) {
  uint64_t seen = __atomic_load_n(offers + gt, __ATOMIC_RELAXED);
  while (seen < offer &&
         !__atomic_compare_exchange_n(offers + gt, &seen, offer, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

}  // namespace

void cpu_match_first_pass(const MatchProblem& p, int64_t block_begin, int64_t block_end) {
  AnchorBlock block;
  for (int64_t b = block_begin; b < block_end; ++b) {
    const int64_t begin = b * kMatchBlock;
    const int64_t count = p.num_anchors - begin < kMatchBlock ? p.num_anchors - begin : kMatchBlock;
    Box bounds;
    bound_block(p.anchors + begin, count, bounds);
    bool loaded = false;  // most blocks of a grid touch nothing, and are never taken apart
    const auto load_once = [&] {
      if (!loaded) load_block(p.anchors + begin, count, block);
      loaded = true;
    };

    for (int64_t j = 0; j < p.num_gts; ++j) {
      if (!touches(p.gt_boxes[j], bounds)) continue;
      load_once();
      match_gt(canonical_box(p.gt_boxes[j]), int32_t(j), block);
    }
    bool labelled = false;
    const auto label_once = [&] {
      if (labelled) return;
      load_once();
      bool any_offer = false;
      label_block(p.low, p.high, block, any_offer);
      for (int64_t k = 0; any_offer && k < count; ++k) {
        const int32_t label = block.label[k];
        if (label == kNegative) continue;
        const uint64_t offer = label == kPositive ? kTaken : pack_candidate(block.best_iou[k], uint32_t(begin + k));
        raise_offer(p.offers, block.best_gt[k], offer);
      }
      labelled = true;
    };
    if (loaded) label_once();
    for (int64_t j = 0; j < p.num_ignore_boxes; ++j) {
      if (!touches(p.ignore_boxes[j], bounds)) continue;
      label_once();
      ignore_in_block(canonical_box(p.ignore_boxes[j]), p.ignore_thresh, block);
    }

    if (loaded) {
      store_block(block, count, p.matched_idxs + begin, p.match_labels + begin, p.max_ious + begin);
    } else {
      static_assert(kNegative == 0, "what nothing touches is all zeros");
      std::memset(p.matched_idxs + begin, 0, size_t(count) * sizeof(int64_t));
      std::memset(p.match_labels + begin, 0, size_t(count));
      std::memset(p.max_ious + begin, 0, size_t(count) * sizeof(float));
    }
  }
}

void cpu_match_second_pass(const MatchProblem& p) {
  if (p.second_pass == SecondPass::kBest) {
    for (int64_t j = 0; j < p.num_gts; ++j) {
      if (is_candidate(p.offers[j])) p.match_labels[candidate_anchor(p.offers[j])] = kPositive;
    }
  } else if (p.second_pass == SecondPass::kAll) {
    for (int64_t i = 0; i < p.num_anchors; ++i) {
      const bool ignored_by_iou = first_pass_label(p.max_ious[i], p.low, p.high) == kIgnored;
      if (ignored_by_iou && is_candidate(p.offers[p.matched_idxs[i]])) p.match_labels[i] = kPositive;
    }
  }
}

}  // namespace gs_d2
