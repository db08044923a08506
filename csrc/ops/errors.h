// How the ops fail: RuntimeError in Python, with a message "<op>: <argument> must ..., got ...". torch's own macros
// (STD_TORCH_CHECK, TORCH_ERROR_CODE_CHECK) begin with a source path, or say nothing else.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <iomanip>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace gs_d2 {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// A macro, so that the parts of the message are put together only where it fails.
#define GS_CHECK(condition, ...)                                            \
  do {                                                                      \
    if (!(condition)) throw std::runtime_error(::gs_d2::text(__VA_ARGS__)); \
  } while (false)

// As Python writes a tuple.
inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::ostringstream out;
  out << "(";
  for (size_t d = 0; d < shape.size(); ++d) out << (d > 0 ? ", " : "") << shape[d];
  out << (shape.size() == 1 ? ",)" : ")");
  return out.str();
}

inline std::vector<int64_t> shape_of(const torch::stable::Tensor& tensor) {
  std::vector<int64_t> shape(size_t(tensor.dim()));
  for (size_t d = 0; d < shape.size(); ++d) shape[d] = tensor.size(int64_t(d));
  return shape;
}

inline std::string shape_text(const torch::stable::Tensor& tensor) {
  return shape_text(shape_of(tensor));
}

// torch's number for a dtype, and for that of a tensor.
inline int32_t dtype_code(torch::headeronly::ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

inline int32_t dtype_code(const torch::stable::Tensor& tensor) {
  int32_t code = -1;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

// As Python prints it.
inline std::string dtype_text(int32_t code) {
  const std::pair<int32_t, const char*> names[] = {
      {aoti_torch_dtype_uint8(), "torch.uint8"},
      {aoti_torch_dtype_uint16(), "torch.uint16"},
      {aoti_torch_dtype_uint32(), "torch.uint32"},
      {aoti_torch_dtype_uint64(), "torch.uint64"},
      {aoti_torch_dtype_int8(), "torch.int8"},
      {aoti_torch_dtype_int16(), "torch.int16"},
      {aoti_torch_dtype_int32(), "torch.int32"},
      {aoti_torch_dtype_int64(), "torch.int64"},
      {aoti_torch_dtype_bool(), "torch.bool"},
      {aoti_torch_dtype_float16(), "torch.float16"},
      {aoti_torch_dtype_bfloat16(), "torch.bfloat16"},
      {aoti_torch_dtype_float32(), "torch.float32"},
      {aoti_torch_dtype_float64(), "torch.float64"},
      {aoti_torch_dtype_complex32(), "torch.complex32"},
      {aoti_torch_dtype_complex64(), "torch.complex64"},
      {aoti_torch_dtype_complex128(), "torch.complex128"},
      {aoti_torch_dtype_float8_e5m2(), "torch.float8_e5m2"},
      {aoti_torch_dtype_float8_e4m3fn(), "torch.float8_e4m3fn"},
      {aoti_torch_dtype_float8_e5m2fnuz(), "torch.float8_e5m2fnuz"},
      {aoti_torch_dtype_float8_e4m3fnuz(), "torch.float8_e4m3fnuz"},
  };
  for (const auto& [known, name] : names) {
    if (code == known) return name;
  }
  return "another dtype";
}

inline std::string device_text(const torch::stable::Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return tensor.is_cuda() ? text("cuda:", tensor.get_device_index()) : "another device";
}

// No memory for what an op allocates. torch's own exception does not pass the stable ABI; this one has the words by
// which torch's is recognised ("CUDA out of memory. ", "DefaultCPUAllocator: can't allocate memory"), and gs_d2.ops
// gives CUDA's the type of torch's, torch.OutOfMemoryError.
class OutOfMemory : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void fail_to_allocate(const char* op, const char* what, const std::vector<int64_t>& shape,
                                          int32_t dtype, bool on_cuda) {
  int64_t bytes = int64_t(aoti_torch_dtype_element_size(dtype));
  bool countable = true;
  for (const int64_t size : shape) countable = countable && !__builtin_mul_overflow(bytes, size, &bytes);
  const std::string subject = text(op, ": ", what, " of shape ", shape_text(shape));
  GS_CHECK(countable, subject, " must take less than 2^63 bytes");
  if (!on_cuda) {
    throw OutOfMemory(
        text(subject, ": DefaultCPUAllocator: can't allocate memory: you tried to allocate ", bytes, " bytes"));
  }
  const bool large = bytes >= int64_t{1} << 30;
  throw OutOfMemory(text(subject, ": CUDA out of memory. Tried to allocate ", std::fixed, std::setprecision(2),
                         double(bytes) / (large ? 1 << 30 : 1 << 20), large ? " GiB." : " MiB."));
}

}  // namespace gs_d2
