// What every op's binding needs of torch, on the stable ABI: argument checks, the device guard and the
// stream, registration.
//
// MTFAST_WITH_CUDA: the CUDA implementations are there too. MTFAST_CUDA_ON_CPU: they alone are, over kernels
// that run on the CPU (tests/cuda_on_cpu), and torch finds them for tensors of the CPU.
#pragma once
#ifdef MTFAST_WITH_CUDA
#include <cuda_runtime_api.h>
#endif
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

namespace mtfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Library = torch::stable::detail::StableLibrary;

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
  check(x.device() == like.device(), op, ": ", name, " must be on the device of ", like_name);
}

inline void check_contiguous(const char* op, const char* name, const Tensor& x) {
  check(x.is_contiguous(), op, ": ", name, " must be contiguous: pass ", name, ".contiguous()");
}

// Every row of a tensor with its last dimension contiguous begins on 16 bytes, which CUDA kernels move at a
// time.
inline bool on_16_bytes(const Tensor& x) {
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  if (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 != 0) return false;
  for (int64_t d = 0; d + 1 < x.dim(); ++d)
    if (x.size(d) > 1 && x.stride(d) * bytes % 16 != 0) return false;
  return true;
}

// Contiguous and, for CUDA, on 16 bytes: the tensor itself where it is, else a copy.
template <bool kCuda>
Tensor laid_out(const Tensor& x) {
  const Tensor whole = torch::stable::contiguous(x);
  return kCuda && !on_16_bytes(whole) ? torch::stable::clone(whole) : whole;
}

// A seed where kernels read it: an int64 tensor of one element on the device of `like`.
inline void check_seed(const char* op, const OptionalTensor& seed, const char* like_name,
                       const Tensor& like) {
  check(seed.has_value(), op, ": dropout needs a seed");
  check(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op,
        ": seed must be an int64 tensor of one element");
  check_same_device(op, "seed", *seed, like_name, like);
}

// Dtype and shape of cu_seqlens, and unless they lie on a GPU its values: it starts at 0, never falls and
// ends at total.
template <bool kCuda>
void check_cu_seqlens(const char* op, const Tensor& cu_seqlens, int64_t total) {
  check(cu_seqlens.scalar_type() == ScalarType::Int, op, ": cu_seqlens must be int32");
  check(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, op,
        ": cu_seqlens must have the shape [sequences + 1], found ", cu_seqlens.dim(), " dimensions");
  check_contiguous(op, "cu_seqlens", cu_seqlens);
  if (kCuda) return;
  const int32_t* cu = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t sequences = cu_seqlens.size(0) - 1;
  check(cu[0] == 0, op, ": cu_seqlens must start at 0, found ", cu[0]);
  for (int64_t s = 0; s < sequences; ++s)
    check(cu[s] <= cu[s + 1], op, ": cu_seqlens must not fall, but goes from ", cu[s], " to ", cu[s + 1],
          " after sequence ", s);
  check(cu[sequences] == total, op, ": cu_seqlens must end at the number of tokens, ", total, ", found ",
        cu[sequences]);
}

#ifdef MTFAST_WITH_CUDA
// For its lifetime the tensor's device is current; stream() is torch's current stream there.
class OnDeviceOf {
#ifdef MTFAST_CUDA_ON_CPU
 public:
  explicit OnDeviceOf(const Tensor&) {}
  void* stream() const { return nullptr; }
#else
 public:
  explicit OnDeviceOf(const Tensor& x) : device_(x.get_device_index()), guard_(device_) {}
  void* stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    return stream;
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// A launch function returns 0 or a cudaError_t.
inline void check_launch(const char* op, int error) {
  check(error == 0, op,
        ": the CUDA kernel could not be launched: ", cudaGetErrorString(static_cast<cudaError_t>(error)),
        " (cudaError ", error, ")");
}
#endif

}  // namespace mtfast

// Registers what register_all<kCuda>(library) has, for every device that this build serves.
#if defined(MTFAST_CUDA_ON_CPU)
#define MTFAST_REGISTER(register_all) \
  STABLE_TORCH_LIBRARY_IMPL(mtfast, CPU, library) { register_all<true>(library); }
#elif defined(MTFAST_WITH_CUDA)
#define MTFAST_REGISTER(register_all)                                               \
  STABLE_TORCH_LIBRARY_IMPL(mtfast, CPU, library) { register_all<false>(library); } \
  STABLE_TORCH_LIBRARY_IMPL(mtfast, CUDA, library) { register_all<true>(library); }
#else
#define MTFAST_REGISTER(register_all) \
  STABLE_TORCH_LIBRARY_IMPL(mtfast, CPU, library) { register_all<false>(library); }
#endif
