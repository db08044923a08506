#include <cfloat>

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
  Box bounds;
};

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
  float x1 = FLT_MAX, y1 = FLT_MAX, x2 = -FLT_MAX, y2 = -FLT_MAX;
  for (int64_t k = 0; k < kMatchBlock; ++k) {
    const bool valid = block.area[k] > 0.0f;
    x1 = min_of(valid ? block.x1[k] : FLT_MAX, x1);
    y1 = min_of(valid ? block.y1[k] : FLT_MAX, y1);
    x2 = max_of(valid ? block.x2[k] : -FLT_MAX, x2);
    y2 = max_of(valid ? block.y2[k] : -FLT_MAX, y2);
    block.best_iou[k] = 0.0f;
    block.best_gt[k] = 0;
  }
  block.bounds = {x1, y1, x2, y2};
}

GS_MULTIVERSION(load_block, (const Box* anchors, int64_t count, AnchorBlock& block), (anchors, count, block))

inline __attribute__((always_inline)) void match_gt_body(Box gt, int32_t gt_idx, AnchorBlock& block) {
  const float gt_area = box_area(gt);
  for (int64_t k = 0; k < kMatchBlock; ++k) {
    const float inter = box_intersection(gt, {block.x1[k], block.y1[k], block.x2[k], block.y2[k]});
    const float iou = iou_of_areas(inter, gt_area, block.area[k]);
    const bool better = iou > block.best_iou[k];  // strict: the lowest ground truth wins a tie
    block.best_iou[k] = better ? iou : block.best_iou[k];
    block.best_gt[k] = better ? gt_idx : block.best_gt[k];
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
    load_block(p.anchors + begin, count, block);

    for (int64_t j = 0; j < p.num_gts; ++j) {
      const Box gt = canonical_box(p.gt_boxes[j]);
      if (touches(gt, block.bounds)) match_gt(gt, int32_t(j), block);
    }
    bool any_offer = false;
    label_block(p.low, p.high, block, any_offer);
    for (int64_t k = 0; any_offer && k < count; ++k) {
      const int32_t label = block.label[k];
      if (label == kNegative) continue;
      const uint64_t offer = label == kPositive ? kTaken : pack_candidate(block.best_iou[k], uint32_t(begin + k));
      raise_offer(p.offers, block.best_gt[k], offer);
    }
    for (int64_t j = 0; j < p.num_ignore_boxes; ++j) {
      const Box ignore_box = canonical_box(p.ignore_boxes[j]);
      if (touches(ignore_box, block.bounds)) ignore_in_block(ignore_box, p.ignore_thresh, block);
    }
    for (int64_t k = 0; k < count; ++k) {
      p.matched_idxs[begin + k] = block.best_gt[k];
      p.match_labels[begin + k] = int8_t(block.label[k]);
      p.max_ious[begin + k] = block.best_iou[k];
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
