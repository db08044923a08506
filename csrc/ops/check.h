// What every backend asks of its arguments, and the shapes that follow from them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "../math/box_iou.h"
#include "../math/reservoir.h"
#include "../math/two_pass_match.h"
#include "errors.h"

namespace gs_d2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Indices are packed into 32 bits.
constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  const int32_t need = dtype_code(dtype), got = dtype_code(tensor);
  GS_CHECK(got == need, op, ": ", name, " must be ", dtype_text(need).substr(sizeof "torch." - 1), ", got ",
           dtype_text(got));
}

inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like,
                         const char* like_name) {
  GS_CHECK(tensor.device() == like.device(), op, ": ", name, " must be on the same device as ", like_name, ", ",
           device_text(like), ", got ", device_text(tensor));
}

inline void check_boxes(const char* op, const char* name, const Tensor& boxes) {
  GS_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, op, ": ", name, " must have shape (M, 4), got ", shape_text(boxes));
  check_dtype(op, name, boxes, ScalarType::Float);
  GS_CHECK(boxes.size(0) <= kMaxIndex, op, ": ", name, " must have at most 2^31 - 1 rows, got ", boxes.size(0));
}

inline void check_offsets(const char* op, const char* name, const Tensor& offsets, int64_t num_images,
                          const Tensor& like, const char* like_name) {
  check_dtype(op, name, offsets, ScalarType::Long);
  GS_CHECK(offsets.dim() == 1 && offsets.size(0) == num_images + 1, op, ": ", name, " must have shape (",
           num_images + 1, ",), one more than there are images, got ", shape_text(offsets));
  check_device(op, name, offsets, like, like_name);
}

// NaN fails every comparison, so it is refused by all of these. So is what float32, which the kernels use, makes 0.
inline void check_fraction(const char* op, const char* name, double value, bool zero_allowed) {
  GS_CHECK((zero_allowed ? value >= 0.0 : float(value) > 0.0f) && value <= 1.0, op, ": ", name, " must be in ",
           zero_allowed ? "[0, 1]" : "(0, 1]", ", got ", value);
}

struct MatchShape {
  int64_t num_images;
  int64_t num_anchors;
  bool batched;            // results [B, N], not [N]
  bool anchors_per_image;  // anchors [B, N, 4], not shared
};

inline MatchShape check_two_pass_match(const Tensor& gt_boxes, const Tensor& anchors, const OptionalTensor& gt_offsets,
                                       const OptionalTensor& ignore_boxes, const OptionalTensor& ignore_offsets,
                                       double low, double high, int64_t second_pass, double ignore_thresh) {
  constexpr const char* op = "two_pass_match";
  check_boxes(op, "gt_boxes", gt_boxes);
  MatchShape shape{1, 0, gt_offsets.has_value(), false};
  if (gt_offsets) {
    GS_CHECK(gt_offsets->dim() == 1 && gt_offsets->size(0) >= 1, op, ": gt_offsets must have shape (B + 1,), got ",
             shape_text(*gt_offsets));
    shape.num_images = gt_offsets->size(0) - 1;
    check_offsets(op, "gt_offsets", *gt_offsets, shape.num_images, gt_boxes, "gt_boxes");
  }
  shape.anchors_per_image = anchors.dim() == 3;
  GS_CHECK(anchors.dim() >= 2 && anchors.dim() <= 3 && anchors.size(anchors.dim() - 1) == 4, op,
           ": anchors must have shape (N, 4), or (B, N, 4) with gt_offsets, got ", shape_text(anchors));
  GS_CHECK(!shape.anchors_per_image || (shape.batched && anchors.size(0) == shape.num_images), op,
           ": anchors of shape (B, N, 4) need gt_offsets of shape (B + 1,), got anchors ", shape_text(anchors));
  check_dtype(op, "anchors", anchors, ScalarType::Float);
  check_device(op, "anchors", anchors, gt_boxes, "gt_boxes");
  shape.num_anchors = anchors.size(anchors.dim() - 2);
  GS_CHECK(shape.num_anchors <= kMaxIndex, op, ": anchors must number at most 2^31 - 1 per image, got ",
           shape.num_anchors);
  if (ignore_boxes) {
    check_boxes(op, "ignore_boxes", *ignore_boxes);
    check_device(op, "ignore_boxes", *ignore_boxes, gt_boxes, "gt_boxes");
  }
  GS_CHECK(ignore_offsets.has_value() == (ignore_boxes.has_value() && shape.batched), op,
           ": ignore_offsets must be given exactly when gt_offsets and ignore_boxes are, got ",
           ignore_offsets ? "it without both of them" : "none with them");
  if (ignore_offsets) check_offsets(op, "ignore_offsets", *ignore_offsets, shape.num_images, gt_boxes, "gt_boxes");
  check_fraction(op, "low", low, false);
  check_fraction(op, "high", high, false);
  GS_CHECK(low <= high, op, ": low must not exceed high, got low = ", low, ", high = ", high);
  check_fraction(op, "ignore_thresh", ignore_thresh, false);
  GS_CHECK(second_pass >= int64_t(SecondPass::kNone) && second_pass <= int64_t(SecondPass::kAll), op,
           ": second_pass must be 0 (none), 1 (best) or 2 (all), got ", second_pass);
  return shape;
}

struct SubsampleShape {
  int64_t num_images;
  int64_t num_anchors;
  bool groups_per_image;  // group_idxs [B, N], not shared
};

inline SubsampleShape check_group_subsample(const Tensor& match_labels, const Tensor& group_idxs,
                                            const OptionalTensor& losses, const OptionalTensor& seed_tensor,
                                            int64_t first_image, int64_t num_groups, int64_t num_per_group,
                                            double positive_fraction, int64_t method) {
  constexpr const char* op = "group_subsample";
  check_dtype(op, "match_labels", match_labels, ScalarType::Char);
  GS_CHECK(match_labels.dim() == 1 || match_labels.dim() == 2, op,
           ": match_labels must have shape (N,) or (B, N), got ", shape_text(match_labels));
  const bool batched = match_labels.dim() == 2;
  SubsampleShape shape{batched ? match_labels.size(0) : 1, match_labels.size(match_labels.dim() - 1), false};
  GS_CHECK(shape.num_images <= kMaxIndex, op, ": match_labels must be of at most 2^31 - 1 images, got ",
           shape.num_images);
  GS_CHECK(shape.num_anchors <= kMaxIndex, op, ": match_labels must number at most 2^31 - 1 per image, got ",
           shape.num_anchors);
  const auto same_shape = [&](const Tensor& t) {
    return t.dim() == match_labels.dim() && t.size(t.dim() - 1) == shape.num_anchors &&
           (!batched || t.size(0) == shape.num_images);
  };
  check_dtype(op, "group_idxs", group_idxs, ScalarType::Long);
  check_device(op, "group_idxs", group_idxs, match_labels, "match_labels");
  shape.groups_per_image = batched && group_idxs.dim() == 2;
  GS_CHECK((group_idxs.dim() == 1 && group_idxs.size(0) == shape.num_anchors) || same_shape(group_idxs), op,
           ": group_idxs must have shape (", shape.num_anchors, ",) or that of match_labels, got ",
           shape_text(group_idxs));
  GS_CHECK(method >= int64_t(SampleMethod::kRandom) && method <= int64_t(SampleMethod::kOhemAll), op,
           ": method must be 0 (random), 1 (wrs), 2 (ohem) or 3 (ohem_all), got ", method);
  GS_CHECK(losses.has_value() == (method != int64_t(SampleMethod::kRandom)), op,
           ": losses must be given for wrs, ohem and ohem_all, and only for them, got ",
           losses ? "losses for random" : "none");
  if (losses) {
    check_dtype(op, "losses", *losses, ScalarType::Float);
    check_device(op, "losses", *losses, match_labels, "match_labels");
    GS_CHECK(same_shape(*losses), op, ": losses must have the shape of match_labels, ", shape_text(match_labels),
             ", got ", shape_text(*losses));
  }
  if (seed_tensor) {
    check_dtype(op, "seed", *seed_tensor, ScalarType::Long);
    check_device(op, "seed", *seed_tensor, match_labels, "match_labels");
    GS_CHECK(seed_tensor->dim() == 0, op, ": seed must be an int or a 0-dim int64 tensor, got shape ",
             shape_text(*seed_tensor));
  }
  const int64_t last_start = kMaxIndex - shape.num_images;
  GS_CHECK(first_image >= 0 && first_image <= last_start, op, ": first_image must be in [0, ", last_start, "], got ",
           first_image);
  GS_CHECK(num_groups >= 1 && num_groups <= 1024, op, ": num_groups must be in [1, 1024], got ", num_groups);
  GS_CHECK(num_per_group >= 0 && num_per_group <= kMaxIndex, op, ": num_per_group must be in [0, 2^31), got ",
           num_per_group);
  check_fraction(op, "positive_fraction", positive_fraction, true);
  return shape;
}

inline const Box* boxes_ptr(const Tensor& contiguous_boxes) {
  static_assert(sizeof(Box) == 4 * sizeof(float));
  return reinterpret_cast<const Box*>(contiguous_boxes.const_data_ptr<float>());
}

}  // namespace gs_d2
