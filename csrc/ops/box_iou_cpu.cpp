#include "../cpu/kernels.h"
#include "check.h"
#include "tensors.h"

namespace gs_d2 {

namespace {

Tensor box_iou_cpu(const Tensor& boxes1, const Tensor& boxes2) {
  check_boxes("box_iou", "boxes1", boxes1);
  check_boxes("box_iou", "boxes2", boxes2);
  check_device("box_iou", "boxes2", boxes2, boxes1, "boxes1");
  const int64_t m = boxes1.size(0), n = boxes2.size(0);
  Tensor ious = new_tensor("box_iou", "IoUs", boxes1, {m, n}, ScalarType::Float);
  if (m == 0 || n == 0) return ious;

  const Tensor rows = packed("box_iou", "boxes1", boxes1);
  const Tensor columns = packed("box_iou", "boxes2", boxes2);
  float* out = ious.mutable_data_ptr<float>();
  const int64_t grain = 1 + (int64_t{1} << 16) / n;
  parallel_for(0, m, grain, [&](int64_t begin, int64_t end) {
    cpu_box_iou(boxes_ptr(rows), boxes_ptr(columns), n, begin, end, out);
  });
  return ious;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gs_d2, CPU, m) {
  m.impl("box_iou", TORCH_BOX(&box_iou_cpu));
}

}  // namespace gs_d2
