// What the CUDA backends need around a launcher: the device, the stream that torch uses now, and the error after it.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/kernels.h"
#include "check.h"

// Declared here, not taken from torch's header, to be weak: the library must also load where torch has no CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace gs_d2 {

using torch::stable::accelerator::DeviceGuard;

inline OptionalTensor contiguous_if_given(const OptionalTensor& tensor) {
  OptionalTensor result;
  if (tensor) result = torch::stable::contiguous(*tensor);
  return result;
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "gs_d2: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the CUDA launch failed: ", cudaGetErrorString(error));
}

}  // namespace gs_d2
