// bias_gelu: argument checks and registration.
#include "bias_gelu.h"

#include <tuple>

#include "binding.h"

namespace mtfast::bias_gelu {
namespace {

constexpr const char* kOp = "bias_gelu";

template <bool kCuda>
Inputs inputs_of(const Tensor& x, const OptionalTensor& bias) {
  check(x.dim() >= 1, kOp, ": x must be [..., columns], found no dimensions");
  check_contiguous(kOp, "x", x);
  const int64_t columns = x.size(x.dim() - 1);
  const Dtype dtype = dtype_of(kOp, "x", x);
  check(!kCuda || dtype != Dtype::kFloat64, kOp,
        ": float64 is for the CPU; on CUDA x must be bfloat16, float16 or float32");
  if (bias) {
    check(bias->dim() == 1 && bias->size(0) == columns, kOp, ": bias must be [", columns, "]");
    check(bias->scalar_type() == x.scalar_type(), kOp, ": bias and x must be of one dtype");
    check_same_device(kOp, "bias", *bias, "x", x);
    check_contiguous(kOp, "bias", *bias);
  }
  const int64_t rows = columns == 0 ? 0 : x.numel() / columns;
  return {rows, columns, dtype, x.const_data_ptr(), bias ? bias->const_data_ptr() : nullptr};
}

template <bool kCuda>
Tensor forward(const Tensor& x, const OptionalTensor& bias) {
  const Inputs in = inputs_of<kCuda>(x, bias);
  Tensor y = torch::stable::empty_like(x);
  if (in.rows == 0) return y;
  if constexpr (kCuda) {
#ifdef MTFAST_WITH_CUDA
    const OnDeviceOf device(x);
    check_launch(kOp, mtfast_bias_gelu_forward(&in, y.mutable_data_ptr(), device.stream()));
#endif
  } else {
    cpu_forward(in, y.mutable_data_ptr());
  }
  return y;
}

// dx, and dbias [columns], with no elements without a bias.
template <bool kCuda>
std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const OptionalTensor& bias) {
  const Inputs in = inputs_of<kCuda>(x, bias);
  bool alike = dy.dim() == x.dim();
  for (int64_t d = 0; alike && d < x.dim(); ++d) alike = dy.size(d) == x.size(d);
  check(alike, kOp, ": dy must have x's shape");
  check(dy.scalar_type() == x.scalar_type(), kOp, ": dy and x must be of one dtype");
  check_same_device(kOp, "dy", dy, "x", x);
  check_contiguous(kOp, "dy", dy);
  Tensor dx = torch::stable::empty_like(x);
  Tensor dbias = torch::stable::new_empty(x, {bias ? in.columns : 0});
  if (in.rows == 0) {
    torch::stable::zero_(dbias);
    return {dx, dbias};
  }
  void* sums = bias ? dbias.mutable_data_ptr() : nullptr;
  if constexpr (kCuda) {
#ifdef MTFAST_WITH_CUDA
    const OnDeviceOf device(x);
    const int64_t chunks = bias ? backward_chunks(in.rows) : 0;
    Tensor partial = torch::stable::new_empty(x, {chunks, in.columns}, ScalarType::Float);
    float* scratch = bias ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr;
    check_launch(kOp, mtfast_bias_gelu_backward(&in, dy.const_data_ptr(), dx.mutable_data_ptr(), scratch,
                                                sums, device.stream()));
#endif
  } else {
    cpu_backward(in, dy.const_data_ptr(), dx.mutable_data_ptr(), sums);
  }
  return {dx, dbias};
}

template <bool kCuda>
void register_all(Library& library) {
  library.impl("bias_gelu", TORCH_BOX(&forward<kCuda>));
  library.impl("bias_gelu_backward", TORCH_BOX(&backward<kCuda>));
}
MTFAST_REGISTER(register_all)

}  // namespace
}  // namespace mtfast::bias_gelu
