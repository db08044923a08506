// What the CUDA backends need around a launcher: the device, the stream that torch uses now, and errors.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/kernels.h"
#include "check.h"

// Declared here, not taken from torch's header, to be weak: the library must also load where torch has no CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace gs_d2 {

inline void check_cuda(const char* op, cudaError_t error) {
  GS_CHECK(error == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(error));
}

// Gives what launch(stream) does, on the device of `like` and the stream that torch uses there now.
template <class Launch>
auto on_current_stream(const char* op, const Tensor& like, const Launch& launch) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  GS_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op, ": this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  try {
    return launch(static_cast<cudaStream_t>(stream));
  } catch (const OutOfMemory&) {
    size_t free = 0, total = 0;
    check_cuda(op, cudaMemGetInfo(&free, &total));  // after a kernel that failed, every allocation fails, too
    throw;
  }
}

}  // namespace gs_d2
