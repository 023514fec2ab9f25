// What every op's binding needs of torch, on the stable ABI: argument checks, the device guard and the
// stream.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "dtype.h"

#ifndef USE_CUDA
// Exported by libtorch in CUDA builds only.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);
#endif

namespace mtfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Raises RuntimeError in Python with the parts put together. A message names the argument, what it is and
// what would be right: check(x.dim() == 1, "mask_tokens: cu_seqlens must have 1 dimension, found ", x.dim()).
template <class... Parts>
void check(bool right, const Parts&... message) {
  if (right) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

// The tensor's dtype; an error for any that no op takes.
inline Dtype dtype_of(const char* op, const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      check(x.scalar_type() == ScalarType::Half, op, ": ", name,
            " must be float32, float64, bfloat16 or float16");
      return Dtype::kFloat16;
  }
}

inline void check_same_device(const char* op, const char* name, const Tensor& x, const char* like_name,
                              const Tensor& like) {
  check(x.is_cuda() == like.is_cuda() && x.get_device_index() == like.get_device_index(), op, ": ", name,
        " must be on the device of ", like_name);
}

inline void check_contiguous(const char* op, const char* name, const Tensor& x) {
  check(x.is_contiguous(), op, ": ", name, " must be contiguous: pass ", name, ".contiguous()");
}

// Dtype and shape of cu_seqlens, and on the CPU its values: it starts at 0, never falls and ends at total.
inline void check_cu_seqlens(const char* op, const Tensor& cu_seqlens, int64_t total) {
  check(cu_seqlens.scalar_type() == ScalarType::Int, op, ": cu_seqlens must be int32");
  check(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, op,
        ": cu_seqlens must have the shape [sequences + 1], found ", cu_seqlens.dim(), " dimensions");
  check_contiguous(op, "cu_seqlens", cu_seqlens);
  if (!cu_seqlens.is_cpu()) return;
  const int32_t* cu = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t sequences = cu_seqlens.size(0) - 1;
  check(cu[0] == 0, op, ": cu_seqlens must start at 0, found ", cu[0]);
  for (int64_t s = 0; s < sequences; ++s)
    check(cu[s] <= cu[s + 1], op, ": cu_seqlens must not fall, but goes from ", cu[s], " to ", cu[s + 1],
          " after sequence ", s);
  check(cu[sequences] == total, op, ": cu_seqlens must end at the number of tokens, ", total, ", found ",
        cu[sequences]);
}

// For its lifetime the tensor's device is current; stream() is torch's current stream there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : device_(x.get_device_index()), guard_(device_) {}

  void* stream() const {
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream != nullptr, "mtfast: this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return stream;
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

// A launch function returns 0 or a cudaError_t.
inline void check_launch(const char* op, int error) {
  check(error == 0, op, ": the CUDA kernel could not be launched, cudaError ", error);
}

}  // namespace mtfast
