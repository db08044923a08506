// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// A counter-based generator: the draw of an anchor is a pure function of (seed, image, anchor, purpose), so it does not
// depend on threads, blocks, batch splits or the device.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace gs_d2 {

struct PhiloxWords {
  uint32_t x0, x1, x2, x3;
};

GS_HOST_DEVICE PhiloxWords philox4x32_10(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter.x0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.x2;
    counter = {uint32_t(product1 >> 32) ^ counter.x1 ^ key0, uint32_t(product1),
               uint32_t(product0 >> 32) ^ counter.x3 ^ key1, uint32_t(product0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// What a draw is for; keeps the streams of different uses apart.
constexpr uint32_t kPurposeGroupSubsample = 0;

// The bits of four consecutive anchors, 4 * quad to 4 * quad + 3: one call of the generator gives four words.
GS_HOST_DEVICE PhiloxWords draw_bits_of_quad(uint64_t seed, uint32_t image_idx, uint32_t quad) {
  const PhiloxWords counter{quad, image_idx, kPurposeGroupSubsample, 0};
  return philox4x32_10(counter, uint32_t(seed), uint32_t(seed >> 32));
}

// 32 random bits of one anchor.
GS_HOST_DEVICE uint32_t draw_bits(uint64_t seed, uint32_t image_idx, uint32_t anchor_idx) {
  const PhiloxWords words = draw_bits_of_quad(seed, image_idx, anchor_idx / 4);
  const uint32_t low = anchor_idx & 1 ? words.x1 : words.x0;
  const uint32_t high = anchor_idx & 1 ? words.x3 : words.x2;
  return anchor_idx & 2 ? high : low;
}

}  // namespace gs_d2
