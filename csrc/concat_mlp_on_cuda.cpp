// concat_mlp's way through CUDA: our kernels, and torch's library for the products that need the whole of
// another's result.
#include "concat_mlp_binding.h"

#ifdef MTFAST_WITH_CUDA
#ifdef MTFAST_CUDA_ON_CPU
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#define MTFAST_TORCH(function, ...) TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_##function(__VA_ARGS__))
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#define MTFAST_TORCH(function, ...) TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_##function(__VA_ARGS__))
#endif

namespace mtfast::concat_mlp {
namespace {

using Dims = std::initializer_list<int64_t>;

// The memory of `from` from element `offset` on under other sizes; by torch's dispatcher a view costs more.
Tensor view_of(const Tensor& from, int64_t offset, Dims sizes, Dims strides) {
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(from.get(), sizes.size(), sizes.begin(),
                                                        strides.begin(), offset, &view));
  return Tensor(view);
}

}  // namespace

Forward forward_on_cuda(const Operands& x, const Tensor& bias1, bool save_hidden) {
  const Layer& layer = x.in.layer;
  const bool in_one = layer.dtype != Dtype::kFloat32;  // the product too is a kernel of our own
  Tensor y = x.empty(layer.batch, layer.outputs);
  Tensor z = x.empty(save_hidden || !in_one ? layer.batch : 0, layer.inner);
  if (layer.batch == 0) return {y, z};
  const OnDeviceOf device(x.u.from);
  if (in_one) {
    const int64_t across = (layer.inner + kSmallestTile - 1) / kSmallestTile;
    Tensor partial =
        torch::stable::new_empty(x.u.from, {across * layer.batch * layer.outputs}, ScalarType::Float);
    check_launch("concat_mlp", mtfast_concat_mlp_forward(&x.in, save_hidden ? z.mutable_data_ptr() : nullptr,
                                                         static_cast<float*>(partial.mutable_data_ptr()),
                                                         y.mutable_data_ptr(), device.stream()));
    return {y, z};
  }
  // One product over the whole row: two, one added to the other, round once more than eager PyTorch does.
  Tensor both = x.empty(layer.batch, 2 * layer.hidden);
  check_launch("concat_mlp", mtfast_concat_mlp_gather(&x.in, both.mutable_data_ptr(), device.stream()));
  const Tensor transposed = view_of(x.weight1, 0, {2 * layer.hidden, layer.inner}, {1, 2 * layer.hidden});
  MTFAST_TORCH(addmm_out, z.get(), bias1.get(), both.get(), transposed.get(), 1.0, 1.0);
  check_launch("concat_mlp",
               mtfast_concat_mlp_output(&x.in, z.const_data_ptr(), y.mutable_data_ptr(), device.stream()));
  return {y, save_hidden ? z : x.empty(0, layer.inner)};
}

Gradients backward_on_cuda(const Operands& x, const Tensor& dy, const Tensor& z, const Needs& needs) {
  Gradients gradients = empty_gradients(x, needs);
  auto& [dinputs, dweight1, dbias1, dweight2, dbias2] = gradients;
  const int64_t batch = x.in.layer.batch, inner = x.in.layer.inner, hidden = x.in.layer.hidden;
  const int64_t sides = needs.sides();
  const OnDeviceOf device(x.u.from);
  // All scratch is one tensor: the hidden layer's gradient, [u; v] and the sums over chunks of rows, each on
  // 16 bytes.
  const int64_t size = static_cast<int64_t>(x.u.from.element_size());
  const auto padded = [&](int64_t elements) { return (elements * size + 15) / 16 * 16 / size; };
  const int64_t both_at = needs.hidden_layer() ? padded(batch * inner) : 0;
  const int64_t partial_at = both_at + (needs.weight1 ? padded(batch * 2 * hidden) : 0);
  Tensor scratch = x.empty(partial_at + backward_scratch_bytes(x.in.layer) / size);
  const auto at = [&](int64_t element) {
    return static_cast<void*>(static_cast<char*>(scratch.mutable_data_ptr()) + element * size);
  };
  const Sums sums{dbias1.mutable_data_ptr(), dweight2.mutable_data_ptr(), dbias2.mutable_data_ptr()};
  check_launch("concat_mlp",
               mtfast_concat_mlp_backward(&x.in, dy.const_data_ptr(), z.const_data_ptr(),
                                          needs.hidden_layer() ? at(0) : nullptr,
                                          static_cast<double*>(at(partial_at)), &sums, device.stream()));
  if (sides > 0) {  // both in one launch: a product for each half of weight1, the same dz for both
    const Tensor dz = view_of(scratch, 0, {sides, batch, inner}, {0, inner, 1});
    const Tensor halves =
        view_of(x.weight1, needs.u ? 0 : hidden, {sides, inner, hidden}, {hidden, 2 * hidden, 1});
    MTFAST_TORCH(bmm_out, dinputs.get(), dz.get(), halves.get());
  }
  if (needs.weight1) {  // two products over halves would each have too few tiles to fill a GPU
    if (batch > 0) check_launch("concat_mlp", mtfast_concat_mlp_gather(&x.in, at(both_at), device.stream()));
    const Tensor transposed = view_of(scratch, 0, {inner, batch}, {1, inner});
    const Tensor both = view_of(scratch, both_at, {batch, 2 * hidden}, {2 * hidden, 1});
    MTFAST_TORCH(mm_out, dweight1.get(), transposed.get(), both.get());
  }
  return gradients;
}

}  // namespace mtfast::concat_mlp
#endif
