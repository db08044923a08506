// The decisions of two-pass matching (paper, eq. 1 and section 4.1), without the loops.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"
#include "labels.h"

namespace gs_d2 {

enum class SecondPass : int64_t { kNone = 0, kBest = 1, kAll = 2 };

// Eq. 1: the first pass.
GS_HOST_DEVICE int8_t first_pass_label(float max_iou, float low, float high) {
  return max_iou >= high ? kPositive : (max_iou >= low ? kIgnored : kNegative);
}

// What the anchors whose best ground truth is j offer to j, reduced with max over all of them:
//   kTaken      at least one is positive after the first pass: j needs no second pass
//   a candidate the highest IoU among the ignored ones, the lowest anchor index on ties
//   kUnmatched  none has j as its best ground truth at IoU >= low: j stays unmatched
constexpr uint64_t kUnmatched = 0;
constexpr uint64_t kTaken = ~uint64_t{0};

// IoU is in (0, 1], so its bits grow with it and the packed word can equal neither constant.
GS_HOST_DEVICE uint64_t pack_candidate(float iou, uint32_t anchor_idx) {
  uint32_t bits;
  memcpy(&bits, &iou, sizeof bits);
  return (uint64_t{bits} << 32) | uint32_t(~anchor_idx);
}

GS_HOST_DEVICE uint32_t candidate_anchor(uint64_t candidate) {
  return ~uint32_t(candidate);
}

GS_HOST_DEVICE bool is_candidate(uint64_t offer) {
  return offer != kUnmatched && offer != kTaken;
}

// A region to ignore swallows an anchor when at least `ignore_thresh` of the anchor's area lies in it.
GS_HOST_DEVICE bool is_swallowed(float inter, float anchor_area, float ignore_thresh) {
  return inter > 0.0f && inter >= ignore_thresh * anchor_area;
}

}  // namespace gs_d2
