#include <tuple>
#include <vector>

#include "../cpu/kernels.h"
#include "check.h"
#include "tensors.h"

namespace gs_d2 {

namespace {

// The rows [begin, end) of each image, checked: on the CPU bad offsets are an error (the GPU clamps them).
class RowRanges {
 public:
  RowRanges(const char* name, const OptionalTensor& offsets, int64_t num_images, int64_t num_rows) {
    if (!offsets) {  // a single image owns all rows, or several have none
      bounds_.assign(num_images + 1, num_rows);
      bounds_[0] = 0;
      return;
    }
    const Tensor rows = packed("two_pass_match", name, *offsets);
    const int64_t* data = rows.const_data_ptr<int64_t>();
    bounds_.assign(data, data + num_images + 1);
    for (int64_t b = 0; b <= num_images; ++b) {
      const bool in_order = bounds_[b] >= (b == 0 ? 0 : bounds_[b - 1]) && (b > 0 || bounds_[b] == 0) &&
                            (b < num_images || bounds_[b] == num_rows);
      GS_CHECK(in_order, "two_pass_match: ", name, " must rise from 0 to the number of boxes, ", num_rows, ", got ",
               bounds_[b], " at index ", b);
    }
  }

  int64_t begin(int64_t image) const {
    return bounds_[image];
  }

  int64_t count(int64_t image) const {
    return bounds_[image + 1] - bounds_[image];
  }

 private:
  std::vector<int64_t> bounds_;
};

std::tuple<Tensor, Tensor, Tensor> two_pass_match_cpu(const Tensor& gt_boxes, const Tensor& anchors,
                                                      OptionalTensor gt_offsets, OptionalTensor ignore_boxes,
                                                      OptionalTensor ignore_offsets, double low, double high,
                                                      int64_t second_pass, double ignore_thresh) {
  const MatchShape shape = check_two_pass_match(gt_boxes, anchors, gt_offsets, ignore_boxes, ignore_offsets, low, high,
                                                second_pass, ignore_thresh);
  const int64_t b = shape.num_images, n = shape.num_anchors;
  const std::vector<int64_t> size = shape.batched ? std::vector<int64_t>{b, n} : std::vector<int64_t>{n};
  constexpr const char* op = "two_pass_match";
  Tensor matched_idxs = new_tensor(op, "matched_idxs", anchors, size, ScalarType::Long);
  Tensor match_labels = new_tensor(op, "match_labels", anchors, size, ScalarType::Char);
  Tensor max_ious = new_tensor(op, "max_ious", anchors, size, ScalarType::Float);
  const RowRanges gts("gt_offsets", gt_offsets, b, gt_boxes.size(0));
  const RowRanges ignores("ignore_offsets", ignore_offsets, b, ignore_boxes ? ignore_boxes->size(0) : 0);
  if (b == 0 || n == 0) return {matched_idxs, match_labels, max_ious};

  const Tensor all_gts = packed(op, "gt_boxes", gt_boxes);
  const Tensor all_anchors = packed(op, "anchors", anchors);
  const Tensor all_ignores = ignore_boxes ? packed(op, "ignore_boxes", *ignore_boxes) : all_gts;
  std::vector<uint64_t> offers(gt_boxes.size(0), kUnmatched);
  std::vector<MatchProblem> problems;
  for (int64_t i = 0; i < b; ++i) {
    problems.push_back({boxes_ptr(all_gts) + gts.begin(i), gts.count(i),
                        boxes_ptr(all_anchors) + (shape.anchors_per_image ? i * n : 0), n,
                        boxes_ptr(all_ignores) + ignores.begin(i), ignores.count(i), float(low), float(high),
                        float(ignore_thresh), SecondPass(second_pass), offers.data() + gts.begin(i),
                        matched_idxs.mutable_data_ptr<int64_t>() + i * n,
                        match_labels.mutable_data_ptr<int8_t>() + i * n, max_ious.mutable_data_ptr<float>() + i * n});
  }
  const int64_t blocks = problems[0].num_blocks();
  constexpr int64_t kGrain = 4;
  parallel_for(0, b * blocks, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t image = begin / blocks;
      const int64_t stop = end < (image + 1) * blocks ? end : (image + 1) * blocks;
      cpu_match_first_pass(problems[image], begin - image * blocks, stop - image * blocks);
      begin = stop;
    }
  });
  for (const MatchProblem& problem : problems) cpu_match_second_pass(problem);
  return {matched_idxs, match_labels, max_ious};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gs_d2, CPU, m) {
  m.impl("two_pass_match", TORCH_BOX(&two_pass_match_cpu));
}

}  // namespace gs_d2
