// The CPU kernels: loops over csrc/math on raw pointers. They know no torch and start no threads; the caller hands out
// ranges. Calls on disjoint ranges of the same problem may run at the same time.
#pragma once

#include <cstdint>
#include <vector>

#include "../math/box_iou.h"
#include "../math/reservoir.h"
#include "../math/two_pass_match.h"

namespace gs_d2 {

// ious[i, j] = IoU(boxes1[i], boxes2[j]) for rows i in [row_begin, row_end).
void cpu_box_iou(const Box* boxes1, const Box* boxes2, int64_t num_boxes2, int64_t row_begin, int64_t row_end,
                 float* ious);

// Matching of one image. Anchors are handled in blocks of kMatchBlock.
constexpr int64_t kMatchBlock = 256;

struct MatchProblem {
  const Box* gt_boxes;
  int64_t num_gts;
  const Box* anchors;
  int64_t num_anchors;
  const Box* ignore_boxes;
  int64_t num_ignore_boxes;
  float low, high, ignore_thresh;
  SecondPass second_pass;
  uint64_t* offers;  // [num_gts], zeroed by the caller; see math/two_pass_match.h
  int64_t* matched_idxs;
  int8_t* match_labels;
  float* max_ious;

  int64_t num_blocks() const {
    return (num_anchors + kMatchBlock - 1) / kMatchBlock;
  }
};

// Eq. 1, ignore boxes, and what each anchor offers its ground truth, for blocks in [block_begin, block_end).
void cpu_match_first_pass(const MatchProblem& problem, int64_t block_begin, int64_t block_end);

// Promotions of the second pass; after all blocks of the first.
void cpu_match_second_pass(const MatchProblem& problem);

// Subsampling of one image. Anchors are handled in chunks of kSubsampleChunk.
constexpr int64_t kSubsampleChunk = 1024;

struct SubsampleProblem {
  const int8_t* match_labels;
  const int64_t* group_idxs;
  const float* losses;  // null for SampleMethod::kRandom
  int64_t num_anchors;
  int64_t num_groups;
  Quota quota;
  SampleMethod method;
  uint64_t seed;
  uint32_t image_idx;
  int8_t* sampled_labels;

  int64_t num_chunks() const {
    return (num_anchors + kSubsampleChunk - 1) / kSubsampleChunk;
  }
};

// The smallest sort keys of every segment (math/reservoir.h); what one range of anchors contributes.
using Reservoirs = std::vector<std::vector<uint64_t>>;

// Writes -1 to the sampled_labels of the chunks in [chunk_begin, chunk_end) and returns the candidates among them.
Reservoirs cpu_subsample_collect(const SubsampleProblem& problem, int64_t chunk_begin, int64_t chunk_end);

// Samples from the candidates of all ranges (merged into `reservoirs`, any order), for groups in [group_begin,
// group_end), and writes the sampled labels.
void cpu_subsample_draw(const SubsampleProblem& problem, Reservoirs& reservoirs, int64_t group_begin,
                        int64_t group_end);

}  // namespace gs_d2
