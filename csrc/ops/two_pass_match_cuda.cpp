#include <tuple>
#include <vector>

#include "cuda_launch.h"
#include "tensors.h"

namespace gs_d2 {

namespace {

const int64_t* offsets_ptr(const OptionalTensor& offsets) {
  return offsets ? offsets->const_data_ptr<int64_t>() : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> two_pass_match_cuda(const Tensor& gt_boxes, const Tensor& anchors,
                                                       OptionalTensor gt_offsets, OptionalTensor ignore_boxes,
                                                       OptionalTensor ignore_offsets, double low, double high,
                                                       int64_t second_pass, double ignore_thresh) {
  const MatchShape shape = check_two_pass_match(gt_boxes, anchors, gt_offsets, ignore_boxes, ignore_offsets, low, high,
                                                second_pass, ignore_thresh);
  constexpr const char* op = "two_pass_match";
  return on_current_stream(op, anchors, [&](cudaStream_t stream) {
    const int64_t b = shape.num_images, n = shape.num_anchors, m = gt_boxes.size(0);
    const std::vector<int64_t> size = shape.batched ? std::vector<int64_t>{b, n} : std::vector<int64_t>{n};
    Tensor matched_idxs = new_tensor(op, "matched_idxs", anchors, size, ScalarType::Long);
    Tensor match_labels = new_tensor(op, "match_labels", anchors, size, ScalarType::Char);
    Tensor max_ious = new_tensor(op, "max_ious", anchors, size, ScalarType::Float);
    if (b == 0 || n == 0) return std::tuple(matched_idxs, match_labels, max_ious);

    const Tensor all_gts = packed(op, "gt_boxes", gt_boxes);
    const Tensor all_anchors = packed(op, "anchors", anchors);
    const OptionalTensor ignores = packed_if_given(op, "ignore_boxes", ignore_boxes);
    const OptionalTensor gt_rows = packed_if_given(op, "gt_offsets", gt_offsets);
    const OptionalTensor ignore_rows = packed_if_given(op, "ignore_offsets", ignore_offsets);
    Tensor offers = new_tensor(op, "scratch", gt_boxes, {m}, ScalarType::Long);
    MatchBatch batch{};
    batch.gt_boxes = boxes_ptr(all_gts);
    batch.num_gts = m;
    batch.gt_offsets = offsets_ptr(gt_rows);
    batch.anchors = boxes_ptr(all_anchors);
    batch.num_anchors = n;
    batch.anchors_per_image = shape.anchors_per_image;
    batch.ignore_boxes = ignores ? boxes_ptr(*ignores) : nullptr;
    batch.num_ignore_boxes = ignores ? ignores->size(0) : 0;
    batch.ignore_offsets = offsets_ptr(ignore_rows);
    batch.num_images = b;
    batch.low = float(low);
    batch.high = float(high);
    batch.ignore_thresh = float(ignore_thresh);
    batch.second_pass = SecondPass(second_pass);
    batch.offers = reinterpret_cast<uint64_t*>(offers.mutable_data_ptr<int64_t>());
    batch.matched_idxs = matched_idxs.mutable_data_ptr<int64_t>();
    batch.match_labels = match_labels.mutable_data_ptr<int8_t>();
    batch.max_ious = max_ious.mutable_data_ptr<float>();
    check_cuda(op, launch_two_pass_match(batch, stream));
    return std::tuple(matched_idxs, match_labels, max_ious);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gs_d2, CUDA, m) {
  m.impl("two_pass_match", TORCH_BOX(&two_pass_match_cuda));
}

}  // namespace gs_d2
