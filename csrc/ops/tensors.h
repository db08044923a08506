// Tensors for kernels. torch::stable's own functions for this look operators up by name at every call, which on small
// images costs as much as the kernel.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <vector>

#include "errors.h"

namespace gs_d2 {

// An uninitialised contiguous tensor on the device of `like`; `what` it is, for the error where there is no memory.
inline torch::stable::Tensor new_tensor(const char* op, const char* what, const torch::stable::Tensor& like,
                                        const std::vector<int64_t>& shape, int32_t dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(shape[d], 1);
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), dtype, device_type, device_index,
                               &handle) != AOTI_TORCH_SUCCESS) {
    fail_to_allocate(op, what, shape, dtype, like.is_cuda());
  }
  return torch::stable::Tensor(handle);
}

inline torch::stable::Tensor new_tensor(const char* op, const char* what, const torch::stable::Tensor& like,
                                        const std::vector<int64_t>& shape, torch::headeronly::ScalarType dtype) {
  return new_tensor(op, what, like, shape, dtype_code(dtype));
}

// The same values, contiguous.
inline torch::stable::Tensor packed(const char* op, const char* name, const torch::stable::Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  torch::stable::Tensor copy = new_tensor(op, name, tensor, shape_of(tensor), dtype_code(tensor));
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), tensor.get(), 0));
  return copy;
}

inline std::optional<torch::stable::Tensor> packed_if_given(const char* op, const char* name,
                                                            const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? std::optional<torch::stable::Tensor>(packed(op, name, *tensor)) : std::nullopt;
}

// torch::stable::parallel_for, but what `body` throws (std::bad_alloc) comes out as it is.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  std::exception_ptr thrown;
  std::mutex throwing;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    try {
      body(from, to);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(throwing);
      thrown = std::current_exception();
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace gs_d2
