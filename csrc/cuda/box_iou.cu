#include "kernels.h"
#include "launch.h"

namespace gs_d2 {

namespace {

constexpr int kPairsPerThread = 8;

// The matrix is cut into equal stretches whatever its shape, so that a few columns keep the GPU as busy as many.
__global__ void __launch_bounds__(kThreads)
    box_iou_kernel(const Box* boxes1, const Box* boxes2, int64_t num_boxes2, int64_t num_pairs, float* ious) {
  int64_t pair = int64_t(blockIdx.x) * (kThreads * kPairsPerThread) + threadIdx.x;
  int64_t row = pair / num_boxes2;
  int64_t column = pair % num_boxes2;
  // A step of kThreads pairs, as rows and columns: one division instead of one per pair.
  const int64_t row_step = kThreads / num_boxes2;
  const int64_t column_step = kThreads % num_boxes2;
  for (int k = 0; k < kPairsPerThread && pair < num_pairs; ++k) {
    const Box a = canonical_box(boxes1[row]);
    const Box b = canonical_box(boxes2[column]);
    ious[pair] = iou_of_areas(box_intersection(a, b), box_area(a), box_area(b));
    pair += kThreads;
    row += row_step;
    column += column_step;
    if (column >= num_boxes2) {
      column -= num_boxes2;
      ++row;
    }
  }
}

}  // namespace

cudaError_t launch_box_iou(const Box* boxes1, int64_t num_boxes1, const Box* boxes2, int64_t num_boxes2, float* ious,
                           cudaStream_t stream) {
  const int64_t num_pairs = num_boxes1 * num_boxes2;
  if (num_pairs == 0) return cudaSuccess;
  const int64_t blocks = ceil_div(num_pairs, kThreads * kPairsPerThread);
  if (blocks > kMaxGridX) return cudaErrorInvalidValue;
  GS_LAUNCH(box_iou_kernel, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, boxes1, boxes2, num_boxes2, num_pairs,
            ious);
  return cudaGetLastError();
}

}  // namespace gs_d2
