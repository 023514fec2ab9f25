// dropout_add_layer_norm: argument checks and registration.
#include "dropout_add_layer_norm.h"

#include <tuple>

#include "binding.h"

namespace mtfast::dropout_add_layer_norm {
namespace {

constexpr const char* kOp = "dropout_add_layer_norm";
enum Needs { kNeedX = 1, kNeedResidual = 2, kNeedWeight = 4, kNeedBias = 8, kNeedXBias = 16 };

void check_like(const char* name, const Tensor& t, const Tensor& x, bool is_vector) {
  if (is_vector)
    check(t.dim() == 1 && t.size(0) == x.size(x.dim() - 1), kOp, ": ", name, " must be [",
          x.size(x.dim() - 1), "], the last dimension of x");
  else
    check(t.sizes().equals(x.sizes()), kOp, ": ", name, " must have the shape of x");
  check(t.scalar_type() == x.scalar_type(), kOp, ": ", name, " and x must be of one dtype");
  check_same_device(kOp, name, t, "x", x);
  check_contiguous(kOp, name, t);
}

// Checks every operand but the bias.
template <bool kCuda>
Inputs inputs_of(const Tensor& x, const OptionalTensor& residual, const Tensor& weight,
                 const OptionalTensor& x_bias, double dropout_p, const OptionalTensor& seed) {
  check(x.dim() >= 1, kOp, ": x must be [..., hidden], found no dimensions");
  Layer layer;
  layer.hidden = x.size(x.dim() - 1);
  check(layer.hidden >= 1, kOp, ": x must be [..., hidden] with hidden of at least 1, found 0");
  layer.rows = x.numel() / layer.hidden;
  layer.dtype = dtype_of(kOp, "x", x);
  check(!kCuda || layer.dtype != Dtype::kFloat64, kOp,
        ": float64 is for the CPU; on CUDA x must be bfloat16, float16 or float32");
  check_contiguous(kOp, "x", x);
  check_like("weight", weight, x, true);
  if (residual) check_like("residual", *residual, x, false);
  if (x_bias) check_like("x_bias", *x_bias, x, true);
  check(dropout_p >= 0 && dropout_p < 1, kOp, ": dropout_p must be in [0, 1), found ", dropout_p);
  if (dropout_p != 0 || seed) {
    check_seed(kOp, seed, "x", x);
    layer.seed = static_cast<const int64_t*>(seed->const_data_ptr());
  }
  layer.threshold = dropout_threshold(dropout_p);
  layer.scale = 65536.0 / (65536.0 - layer.threshold);
  const auto data = [](const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; };
  return {layer, x.const_data_ptr(), data(residual), weight.const_data_ptr(), nullptr, data(x_bias)};
}

ScalarType stats_dtype(const Layer& layer) {
  return layer.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

template <bool kCuda>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const OptionalTensor& residual, const Tensor& weight,
                                   const Tensor& bias, const OptionalTensor& x_bias, double dropout_p,
                                   double eps, const OptionalTensor& seed, bool save_stats) {
  Inputs in = inputs_of<kCuda>(x, residual, weight, x_bias, dropout_p, seed);
  check_like("bias", bias, x, true);
  in.bias = bias.const_data_ptr();
  check(eps >= 0, kOp, ": eps must not be negative, found ", eps);
  in.layer.eps = eps;
  const Tensor y = torch::stable::empty_like(x);
  const Tensor stats =
      torch::stable::new_empty(x, {save_stats ? in.layer.rows : 0, 2}, stats_dtype(in.layer));
  if (in.layer.rows == 0) return {y, stats};
  void* const stats_data = save_stats ? stats.mutable_data_ptr() : nullptr;
  if constexpr (kCuda) {
#ifdef MTFAST_WITH_CUDA
    const OnDeviceOf device(x);
    check_launch(kOp, mtfast_dropout_add_layer_norm_forward(
                          &in, y.mutable_data_ptr(), static_cast<float*>(stats_data), device.stream()));
#endif
  } else {
    cpu_forward(in, y.mutable_data_ptr(), stats_data);
  }
  return {y, stats};
}

template <bool kCuda>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x,
                                                            const OptionalTensor& residual,
                                                            const Tensor& weight,
                                                            const OptionalTensor& x_bias, const Tensor& stats,
                                                            double dropout_p, const OptionalTensor& seed,
                                                            int64_t needs) {
  const Inputs in = inputs_of<kCuda>(x, residual, weight, x_bias, dropout_p, seed);
  check_like("dy", dy, x, false);
  check(stats.dim() == 2 && stats.size(0) == in.layer.rows && stats.size(1) == 2 &&
            stats.scalar_type() == stats_dtype(in.layer),
        kOp, ": stats must be those of the forward: ", in.layer.rows, " rows of mean and rstd");
  check_same_device(kOp, "stats", stats, "x", x);
  check_contiguous(kOp, "stats", stats);
  if (dropout_p == 0 && (needs & kNeedResidual) != 0) needs = (needs | kNeedX) & ~kNeedResidual;
  const auto wanted = [&](Needs need, const Tensor& like) {
    return (needs & need) != 0 ? torch::stable::empty_like(like) : torch::stable::new_empty(like, {0});
  };
  const Tensor dx = wanted(kNeedX, x), dresidual = wanted(kNeedResidual, x);
  const Tensor dweight = wanted(kNeedWeight, weight), dbias = wanted(kNeedBias, weight);
  const Tensor dx_bias = wanted(kNeedXBias, weight);
  const auto data = [&](Needs need, const Tensor& t) {
    return (needs & need) != 0 ? t.mutable_data_ptr() : nullptr;
  };
  const Gradients to{data(kNeedX, dx), data(kNeedResidual, dresidual), data(kNeedWeight, dweight),
                     data(kNeedBias, dbias), data(kNeedXBias, dx_bias)};
  if constexpr (kCuda) {
#ifdef MTFAST_WITH_CUDA
    const OnDeviceOf device(x);
    const int64_t sums = to.any_sum() ? kSums * chunks(in.layer.rows) * in.layer.hidden : 0;
    const Tensor partial = torch::stable::new_empty(x, {sums}, ScalarType::Float);
    check_launch(kOp, mtfast_dropout_add_layer_norm_backward(
                          &in, dy.const_data_ptr(), static_cast<const float*>(stats.const_data_ptr()), &to,
                          static_cast<float*>(partial.mutable_data_ptr()), device.stream()));
#endif
  } else {
    cpu_backward(in, dy.const_data_ptr(), stats.const_data_ptr(), to);
  }
  return {dx, dresidual, dweight, dbias, dx_bias};
}

template <bool kCuda>
void register_all(Library& library) {
  library.impl("dropout_add_layer_norm", TORCH_BOX(&forward<kCuda>));
  library.impl("dropout_add_layer_norm_backward", TORCH_BOX(&backward<kCuda>));
}
MTFAST_REGISTER(register_all)

}  // namespace
}  // namespace mtfast::dropout_add_layer_norm
