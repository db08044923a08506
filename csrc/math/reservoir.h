// Weighted reservoir sampling without replacement (Efraimidis and Spirakis, 2006; paper, eq. 3) as a sort key.
//
// The paper keeps the K largest r^(1 / (l + eps)). In float32 that power underflows to 0 for a third of realistic
// losses, so the order is taken from -log(r) / (l + eps) instead, smallest first: the same order, no underflow.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"
#include "labels.h"

namespace gs_d2 {

enum class SampleMethod : int64_t { kRandom = 0, kWrs = 1, kOhem = 2, kOhemAll = 3 };

// A segment is the anchors that compete with each other: those of one group and label, at 2 * group + label. With
// kOhemAll labels compete too: all anchors of a group are in the segment of its negatives, which may fill the group.
GS_HOST_DEVICE int64_t segment_idx(SampleMethod method, int64_t group, int8_t label) {
  return 2 * group + (method == SampleMethod::kOhemAll ? kNegative : label);
}

// Whether the order follows from the losses alone, the hardest first.
GS_HOST_DEVICE bool is_ohem(SampleMethod method) {
  return method == SampleMethod::kOhem || method == SampleMethod::kOhemAll;
}

constexpr float kLossEpsilon = 1e-6f;
constexpr float kMaxLoss = 1e6f;

// A loss as the keys use it: NaN and negative values become 0, large ones kMaxLoss.
GS_HOST_DEVICE float clamp_loss(float loss) {
  const float positive = loss > 0.0f ? loss : 0.0f;
  return positive < kMaxLoss ? positive : kMaxLoss;
}

// -log(u) for u = (2 * bits + 1) / 2^33, relative error below 1.6e-7, from adds, multiplies and integer operations
// only: no libm, so every compiler and device gives the same bits.
//
// u = 2^(e - 33) * (1 + f) with f in [-0.293, 0.415), and f is exact before it is rounded to float32. Near u = 1
// e is 33 and the result is -log1p(f) alone: nothing cancels.
GS_HOST_DEVICE float neg_log_uniform(uint32_t bits) {
  // Position of the leading one: the exponent of a float that rounding cannot carry over (the bit below the leading
  // one is cleared). `| 1` leaves the leading one where it is, except for bits = 0, which has 2 * bits + 1 = 1.
  const float leading = float((bits & ~(bits >> 1)) | (bits == 0));
  uint32_t leading_bits;
  memcpy(&leading_bits, &leading, sizeof leading_bits);
  const uint32_t log2_bits = (leading_bits >> 23) - 127;
  const uint32_t shift = 31 - log2_bits;
  // f * 2^32 of the odd number 2 * bits + 1, leading one shifted out; 0 for bits = 0.
  const uint32_t fraction = bits == 0 ? 0 : ((bits << shift) << 1) | (1u << shift);
  constexpr uint32_t kFold = 0x6A000000u;  // f = 0.4140625: above it, take twice the power and a negative f
  const bool fold = fraction >= kFold;
  const float f = fold ? float(0u - fraction) * -0x1p-33f : float(fraction) * 0x1p-32f;
  const float exponent = bits == 0 ? 33.0f : float(int32_t(shift) + (fold ? 0 : 1));

  // log1p(f) = f + f^2 * p(f); p fitted by weighted least squares for the smallest relative error of log1p.
  float p = 0x1.6614fcp-4f;
  p = p * f + -0x1.251634p-3f;
  p = p * f + 0x1.31806cp-3f;
  p = p * f + -0x1.535ad4p-3f;
  p = p * f + 0x1.98d2eap-3f;
  p = p * f + -0x1.0004a6p-2f;
  p = p * f + 0x1.5556f4p-2f;
  p = p * f + -0x1.fffffap-2f;
  const float log1p_f = f + (f * f) * p;
  constexpr float kLn2 = 0x1.62e430p-1f;
  return exponent * kLn2 - log1p_f;
}

// The order in which the anchors of one segment are sampled: smallest key first. Keys tie only by chance or by
// equal losses; sort_key breaks every tie by the lower anchor index.
GS_HOST_DEVICE uint32_t random_key(uint32_t bits) {
  return ~bits;  // the order of -log(u), without the log
}

GS_HOST_DEVICE uint32_t wrs_key(uint32_t bits, float loss) {
  const float key = neg_log_uniform(bits) / (clamp_loss(loss) + kLossEpsilon);
  uint32_t key_bits;
  memcpy(&key_bits, &key, sizeof key_bits);
  return key_bits;  // positive floats order as their bits
}

GS_HOST_DEVICE uint32_t ohem_key(float loss) {
  const float clamped = clamp_loss(loss);
  uint32_t loss_bits;
  memcpy(&loss_bits, &clamped, sizeof loss_bits);
  return ~loss_bits;  // hardest first
}

GS_HOST_DEVICE uint64_t sort_key(uint32_t key, uint32_t anchor_idx) {
  return (uint64_t{key} << 32) | anchor_idx;
}

// How many of a group are sampled: positives up to their share of N, negatives fill the rest (paper, section 4.2). With
// kOhemAll the segment of the positives is empty, and that of the negatives takes all of N.
struct Quota {
  int64_t num_per_group;
  int64_t max_positives;
};

GS_HOST_DEVICE Quota make_quota(int64_t num_per_group, double positive_fraction) {
  return {num_per_group, int64_t(double(num_per_group) * positive_fraction)};
}

}  // namespace gs_d2
