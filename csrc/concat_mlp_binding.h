// What concat_mlp's binding hands, once checked, to the ways through the CPU and through CUDA.
#pragma once
#include <tuple>

#include "binding.h"
#include "concat_mlp.h"

namespace mtfast::concat_mlp {

struct Operands {
  Layer layer;
  int64_t hidden;
  const Tensor &u, &v, &weight1, &weight2;
  const OptionalTensor &u_rows, &v_rows, &seed;
};

// Which gradients of the three that cost a product are asked for.
struct Needs {
  bool u, v, weight1;

  int64_t sides() const { return int64_t{u} + int64_t{v}; }
  bool hidden_layer() const { return u || v || weight1; }
};

// y [batch, outputs] and, unless it is not to be kept and has no rows, z [batch, inner].
using Forward = std::tuple<Tensor, Tensor>;
Forward forward_on_cpu(const Operands& x, const Tensor& bias1, const Tensor& bias2, bool save_hidden);
Forward forward_on_cuda(const Operands& x, const Tensor& bias1, const Tensor& bias2, bool save_hidden);

// Gradients of u's and v's rows, one matrix [batch, hidden] after the other, where asked for; weight1's,
// with no rows unless asked for; bias1's, weight2's and bias2's.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
Gradients backward_on_cpu(const Operands& x, const Tensor& dy, const Tensor& z, const Needs& needs);
Gradients backward_on_cuda(const Operands& x, const Tensor& dy, const Tensor& z, const Needs& needs);

inline Gradients empty_gradients(const Operands& x, const Needs& needs) {
  const int64_t inner = x.layer.inner;
  const auto empty = [&](auto... sizes) { return torch::stable::new_empty(x.u, {sizes...}); };
  return {empty(needs.sides(), x.layer.batch, x.hidden), empty(needs.weight1 ? inner : 0, 2 * x.hidden),
          empty(inner), empty(int64_t{x.layer.outputs}, inner), empty(int64_t{x.layer.outputs})};
}

inline Source source_of(const Tensor& from, const OptionalTensor& rows) {
  return {from.const_data_ptr(), from.stride(0), from.size(0), rows ? rows->const_data_ptr() : nullptr,
          rows && rows->scalar_type() == ScalarType::Long};
}

inline const int64_t* seed_of(const OptionalTensor& seed) {
  return seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr;
}

}  // namespace mtfast::concat_mlp
