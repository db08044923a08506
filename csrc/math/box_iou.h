// Intersection over union of two axis-aligned boxes: the one definition that every op and backend uses.
//
// Boxes are (x1, y1, x2, y2) in absolute pixels, area (x2 - x1) * (y2 - y1), no "+1". Every operation rounds once
// (the build forbids contraction into FMA), so CPU and GPU give the same bits.
#pragma once

#include <cfloat>

#include "host_device.h"

namespace gs_d2 {

struct Box {
  float x1, y1, x2, y2;
};

GS_HOST_DEVICE float min_of(float a, float b) {
  return a < b ? a : b;
}

GS_HOST_DEVICE float max_of(float a, float b) {
  return a > b ? a : b;
}

// Area, or 0 for a box that can match nothing: empty, inverted, NaN, or too large for float32.
GS_HOST_DEVICE float box_area(Box b) {
  const float w = b.x2 - b.x1;
  const float h = b.y2 - b.y1;
  const float area = w * h;
  return (w > 0.0f) & (h > 0.0f) & (area <= FLT_MAX) ? area : 0.0f;
}

// The box itself, or the empty box at the origin (which intersects nothing) where box_area is 0.
GS_HOST_DEVICE Box canonical_box(Box b) {
  const bool valid = box_area(b) > 0.0f;
  return {valid ? b.x1 : 0.0f, valid ? b.y1 : 0.0f, valid ? b.x2 : 0.0f, valid ? b.y2 : 0.0f};
}

// Area of the intersection of two canonical boxes; never more than either area.
GS_HOST_DEVICE float box_intersection(Box a, Box b) {
  const float w = min_of(a.x2, b.x2) - max_of(a.x1, b.x1);
  const float h = min_of(a.y2, b.y2) - max_of(a.y1, b.y1);
  return max_of(w, 0.0f) * max_of(h, 0.0f);
}

// inter / (area_a + area_b - inter), in [0, 1]; 0 where both boxes are empty.
GS_HOST_DEVICE float iou_of_areas(float inter, float area_a, float area_b) {
  const float uni = (area_a + area_b) - inter;
  const float iou = inter / uni;
  return uni > 0.0f ? iou : 0.0f;
}

// False where iou_of_areas cannot exceed `best`, found without a division: a quotient that rounds above best has
// inter > best * union exactly, so inter is no less than that product rounded.
GS_HOST_DEVICE bool iou_may_exceed(float inter, float area_a, float area_b, float best) {
  const float uni = (area_a + area_b) - inter;
  return (inter > 0.0f) & (inter >= best * uni);
}

// Whether two boxes share more than an edge: only those that do can have an intersection above 0.
GS_HOST_DEVICE bool touches(Box box, Box bounds) {
  return box.x1 < bounds.x2 && box.x2 > bounds.x1 && box.y1 < bounds.y2 && box.y2 > bounds.y1;
}

}  // namespace gs_d2
