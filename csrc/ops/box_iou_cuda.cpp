#include "cuda_launch.h"
#include "tensors.h"

namespace gs_d2 {

namespace {

Tensor box_iou_cuda(const Tensor& boxes1, const Tensor& boxes2) {
  check_boxes("box_iou", "boxes1", boxes1);
  check_boxes("box_iou", "boxes2", boxes2);
  check_device("box_iou", "boxes2", boxes2, boxes1, "boxes1");
  return on_current_stream("box_iou", boxes1, [&](cudaStream_t stream) {
    const int64_t m = boxes1.size(0), n = boxes2.size(0);
    Tensor ious = new_tensor("box_iou", "IoUs", boxes1, {m, n}, ScalarType::Float);
    if (m == 0 || n == 0) return ious;

    const Tensor rows = packed("box_iou", "boxes1", boxes1);
    const Tensor columns = packed("box_iou", "boxes2", boxes2);
    check_cuda("box_iou",
               launch_box_iou(boxes_ptr(rows), m, boxes_ptr(columns), n, ious.mutable_data_ptr<float>(), stream));
    return ious;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gs_d2, CUDA, m) {
  m.impl("box_iou", TORCH_BOX(&box_iou_cuda));
}

}  // namespace gs_d2
