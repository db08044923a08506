// The CUDA launchers: csrc/math on raw device pointers. They know no torch, allocate nothing, never wait for the
// device, and may be captured in a CUDA graph. Results are the bits of csrc/cpu. Box pointers need only the alignment
// of float.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../math/box_iou.h"
#include "../math/reservoir.h"
#include "../math/two_pass_match.h"

namespace gs_d2 {

// ious[i * num_boxes2 + j] = IoU(boxes1[i], boxes2[j]).
cudaError_t launch_box_iou(const Box* boxes1, int64_t num_boxes1, const Box* boxes2, int64_t num_boxes2, float* ious,
                           cudaStream_t stream);

// Matching of B images. Image b owns rows [offsets[b], offsets[b + 1]) of the boxes, all of them where offsets is null;
// offsets are clamped to the rows there are, whatever they hold.
struct MatchBatch {
  const Box* gt_boxes;  // [num_gts], of all images
  int64_t num_gts;
  const int64_t* gt_offsets;  // [B + 1] or null
  const Box* anchors;         // [N], or [B, N] with anchors_per_image
  int64_t num_anchors;
  bool anchors_per_image;
  const Box* ignore_boxes;  // [num_ignore_boxes], of all images
  int64_t num_ignore_boxes;
  const int64_t* ignore_offsets;  // [B + 1] or null
  int64_t num_images;
  float low, high, ignore_thresh;  // low > 0
  SecondPass second_pass;
  uint64_t* offers;       // scratch [num_gts]; see math/two_pass_match.h
  int64_t* matched_idxs;  // [B, N], as are the two below
  int8_t* match_labels;
  float* max_ious;
};

cudaError_t launch_two_pass_match(const MatchBatch& batch, cudaStream_t stream);

// Subsampling of B images.
struct SubsampleBatch {
  const int8_t* match_labels;  // [B, N]
  const int64_t* group_idxs;   // [N], or [B, N] with groups_per_image
  const float* losses;         // [B, N]; null for SampleMethod::kRandom
  int64_t num_images;
  int64_t num_anchors;
  int64_t num_groups;
  bool groups_per_image;
  Quota quota;
  SampleMethod method;
  const int64_t* seed_tensor;  // on the device; replaces seed where it is not null
  int64_t seed;
  int64_t first_image;
  int8_t* sampled_labels;  // [B, N]
};

// Bytes of scratch, aligned to 16, that launch_group_subsample needs. They do not depend on the number of anchors.
int64_t group_subsample_scratch_bytes(int64_t num_images, int64_t num_groups);

cudaError_t launch_group_subsample(const SubsampleBatch& batch, void* scratch, cudaStream_t stream);

}  // namespace gs_d2
