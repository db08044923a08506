// What an int8 label says of an anchor.
#pragma once

#include <cstdint>

namespace gs_d2 {

constexpr int8_t kIgnored = -1;
constexpr int8_t kNegative = 0;
constexpr int8_t kPositive = 1;

}  // namespace gs_d2
