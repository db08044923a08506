#include "instruction_set.h"
#include "kernels.h"

namespace gs_d2 {

namespace {

// Columns are handled in tiles whose coordinates are split once and reused by every row of the range.
constexpr int64_t kTile = 512;

struct Tile {
  alignas(64) float x1[kTile], y1[kTile], x2[kTile], y2[kTile], area[kTile];
};

inline __attribute__((always_inline)) void iou_row_body(Box box, const Tile& tile, int64_t count, float* out) {
  const float area = box_area(box);
  for (int64_t j = 0; j < count; ++j) {
    const float inter = box_intersection(box, {tile.x1[j], tile.y1[j], tile.x2[j], tile.y2[j]});
    out[j] = iou_of_areas(inter, area, tile.area[j]);
  }
}

GS_MULTIVERSION(iou_row, (Box box, const Tile& tile, int64_t count, float* out), (box, tile, count, out))

}  // namespace

void cpu_box_iou(const Box* boxes1, const Box* boxes2, int64_t num_boxes2, int64_t row_begin, int64_t row_end,
                 float* ious) {
  Tile tile;
  for (int64_t begin = 0; begin < num_boxes2; begin += kTile) {
    const int64_t count = num_boxes2 - begin < kTile ? num_boxes2 - begin : kTile;
    for (int64_t j = 0; j < count; ++j) {
      const Box box = canonical_box(boxes2[begin + j]);
      tile.x1[j] = box.x1;
      tile.y1[j] = box.y1;
      tile.x2[j] = box.x2;
      tile.y2[j] = box.y2;
      tile.area[j] = box_area(box);
    }
    for (int64_t i = row_begin; i < row_end; ++i) {
      iou_row(canonical_box(boxes1[i]), tile, count, ious + i * num_boxes2 + begin);
    }
  }
}

}  // namespace gs_d2
