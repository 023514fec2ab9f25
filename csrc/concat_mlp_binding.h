// What concat_mlp's binding hands, once checked, to the ways through the CPU and through CUDA.
#pragma once
#include <tuple>

#include "binding.h"
#include "concat_mlp.h"

namespace mtfast::concat_mlp {

// u or v, and which of its rows are read unless all are.
struct Side {
  const Tensor& from;
  const OptionalTensor& rows;
};

struct Operands {
  Inputs in;
  Side u, v;
  const Tensor& weight1;

  // Of u's dtype and on its device.
  template <class... Sizes>
  Tensor empty(Sizes... sizes) const {
    return torch::stable::new_empty(u.from, {sizes...});
  }
};

// Which gradients of the three that cost a product are asked for.
struct Needs {
  bool u, v, weight1;

  int64_t sides() const { return int64_t{u} + int64_t{v}; }
  bool hidden_layer() const { return u || v || weight1; }
};

// y [batch, outputs] and, unless it is not to be kept and has no rows, z [batch, inner].
using Forward = std::tuple<Tensor, Tensor>;
Forward forward_on_cpu(const Operands& x, const Tensor& bias1, bool save_hidden);
Forward forward_on_cuda(const Operands& x, const Tensor& bias1, bool save_hidden);

// Gradients of u's and v's rows, one matrix [batch, hidden] after the other, where asked for; weight1's,
// with no rows unless asked for; bias1's, weight2's and bias2's.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
Gradients backward_on_cpu(const Operands& x, const Tensor& dy, const Tensor& z, const Needs& needs);
Gradients backward_on_cuda(const Operands& x, const Tensor& dy, const Tensor& z, const Needs& needs);

inline Gradients empty_gradients(const Operands& x, const Needs& needs) {
  const Layer& layer = x.in.layer;
  return {x.empty(needs.sides(), layer.batch, layer.hidden),
          x.empty(needs.weight1 ? layer.inner : 0, 2 * layer.hidden), x.empty(layer.inner),
          x.empty(layer.outputs, layer.inner), x.empty(layer.outputs)};
}

}  // namespace mtfast::concat_mlp
