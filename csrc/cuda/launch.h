// What the kernels of this folder share: launching, and the sizes of a block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// The one way to start a kernel, so that tests/cuda_on_cpu can run the same sources without a GPU.
#ifndef GS_LAUNCH
#define GS_LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
#endif

namespace gs_d2 {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int64_t kMaxGridX = 0x7fffffff;
constexpr int64_t kMaxGridY = 65535;
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace gs_d2
