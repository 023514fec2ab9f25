// concat_mlp's way through the CPU, block of rows by block of rows: in bfloat16 the large products are our
// own where the processor allows it, otherwise torch's.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <array>

#include "concat_mlp_binding.h"

namespace mtfast::concat_mlp {
namespace {

constexpr int64_t kForwardRows = 1024;    // of the hidden layer, at a time
constexpr int64_t kProductColumns = 192;  // of weight1's gradient, at a time

// ---- torch's products ----

void product(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out = to + a @ b
void add_product(const Tensor& out, const Tensor& to, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), to.get(), a.get(), b.get(), 1.0, 1.0));
}

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

Tensor rows_of(Tensor from, int64_t begin, int64_t end) {
  return torch::stable::narrow(from, 0, begin, end - begin);
}

Tensor columns_of(Tensor from, int64_t first, int64_t count) {
  return torch::stable::narrow(from, 1, first, count);
}

Tensor half(const Tensor& weight1, int which) {
  const int64_t hidden = weight1.size(1) / 2;
  return columns_of(weight1, which * hidden, hidden);
}

// Rows begin .. end of a side, copied to `to`.
void copy_rows(Tensor to, const Side& side, int64_t begin, int64_t end) {
  if (!side.rows) {
    torch::stable::copy_(to, rows_of(side.from, begin, end));
    return;
  }
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(side.from), from(int64_t{0}), from(rows_of(*side.rows, begin, end)),
                                    from(to)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes what the call returned, `to`
}

// Rows begin .. end of a side as a product reads them: where they are, or a copy of those that are named.
Tensor picked(const Side& side, int64_t begin, int64_t end) {
  if (!side.rows) return rows_of(side.from, begin, end);
  const Tensor rows = torch::stable::new_empty(side.from, {end - begin, side.from.size(1)});
  copy_rows(rows, side, begin, end);
  return rows;
}

// z [end - begin, inner] = [u; v] @ weight1.T + bias1 for rows begin .. end. In 16 bits a rounding between
// the two halves would turn signs around, so there the rows are laid side by side in `both`, which has room
// for as many; otherwise the halves are added up in z and `both` is left alone.
void hidden_rows(const Operands& x, const Tensor& bias1, const Tensor& both, int64_t begin, int64_t end,
                 const Tensor& z) {
  if (x.u.from.element_size() > 2) {
    add_product(z, bias1, picked(x.u, begin, end), transposed(half(x.weight1, 0)));
    add_product(z, z, picked(x.v, begin, end), transposed(half(x.weight1, 1)));
    return;
  }
  const Tensor rows = rows_of(both, 0, end - begin);
  copy_rows(half(rows, 0), x.u, begin, end);
  copy_rows(half(rows, 1), x.v, begin, end);
  add_product(z, bias1, rows, transposed(x.weight1));
}

// One half of weight1's gradient: rows.T @ dz for rows begin .. end, `columns` at a time.
void add_to_weight1(const Tensor& dweight1, const Tensor& dz, const Tensor& rows, int64_t columns,
                    bool first_block) {
  const int64_t hidden = rows.size(1);
  for (int64_t first = 0; first < hidden; first += columns) {
    const int64_t count = std::min(columns, hidden - first);
    const Tensor out = columns_of(dweight1, first, count), from = columns_of(rows, first, count);
    if (first_block)
      product(out, transposed(dz), from);
    else
      add_product(out, out, transposed(dz), from);
  }
}

}  // namespace

Forward forward_on_cpu(const Operands& x, const Tensor& bias1, bool save_hidden) {
  const Layer& layer = x.in.layer;
  const int64_t batch = layer.batch;
  const bool own_product = cpu_multiplies(layer), lays_out = x.u.from.element_size() == 2 && !own_product;
  const int64_t block = own_product && save_hidden ? batch : std::min(kForwardRows, batch);
  Tensor y = x.empty(batch, layer.outputs);
  Tensor z = x.empty(save_hidden ? batch : block, layer.inner);
  Tensor both = x.empty(lays_out ? block : 0, 2 * layer.hidden);
  for (int64_t begin = 0; begin < batch; begin += block) {
    const int64_t end = std::min(batch, begin + block), at = save_hidden ? begin : 0;
    const Tensor part = rows_of(z, at, at + end - begin);
    if (own_product)
      cpu_hidden(x.in, begin, end, part.mutable_data_ptr());
    else
      hidden_rows(x, bias1, both, begin, end, part);
    cpu_forward(x.in, begin, end, part.const_data_ptr(), y.mutable_data_ptr());
  }
  return {y, save_hidden ? z : x.empty(0, layer.inner)};
}

Gradients backward_on_cpu(const Operands& x, const Tensor& dy, const Tensor& z, const Needs& needs) {
  Gradients gradients = empty_gradients(x, needs);
  auto& [dinputs, dweight1, dbias1, dweight2, dbias2] = gradients;
  const Layer& layer = x.in.layer;
  const int64_t block = cpu_backward_rows(layer.batch);
  const bool own_products = cpu_multiplies(layer);
  const int64_t dz_rows = own_products ? block + block % 2 : block;  // ours take rows in pairs
  Tensor dz = x.empty(needs.hidden_layer() ? dz_rows : 0, layer.inner);
  OptionalTensor du, dv;
  if (needs.u) du = torch::stable::select(dinputs, 0, 0);
  if (needs.v) dv = torch::stable::select(dinputs, 0, needs.u);
  const auto data = [](const OptionalTensor& to) { return to ? to->mutable_data_ptr() : nullptr; };
  // What follows from the gradient of rows begin .. end of the hidden layer, which dz then holds.
  const auto from_dz = [&](int64_t begin, int64_t end) {
    if (!needs.hidden_layer()) return;
    if (own_products) {
      cpu_input_gradients(x.in, dz.const_data_ptr(), begin, end, data(du), data(dv));
      if (needs.weight1)
        cpu_weight1_gradient(x.in, dz.mutable_data_ptr(), begin, end, dweight1.mutable_data_ptr());
      return;
    }
    const Tensor part = rows_of(dz, 0, end - begin);
    if (du) product(rows_of(*du, begin, end), part, half(x.weight1, 0));
    if (dv) product(rows_of(*dv, begin, end), part, half(x.weight1, 1));
    if (!needs.weight1) return;
    // The scratch that torch's library takes for this product in 16 bits grows with the columns: where du and
    // dv are in memory too, fewer at a time.
    const bool few = x.u.from.element_size() == 2 && needs.sides() > 0;
    const int64_t columns = few ? kProductColumns : layer.hidden;
    add_to_weight1(half(dweight1, 0), part, picked(x.u, begin, end), columns, begin == 0);
    add_to_weight1(half(dweight1, 1), part, picked(x.v, begin, end), columns, begin == 0);
  };
  cpu_backward(x.in, dy.const_data_ptr(), z.const_data_ptr(),
               needs.hidden_layer() ? dz.mutable_data_ptr() : nullptr, from_dz,
               {dbias1.mutable_data_ptr(), dweight2.mutable_data_ptr(), dbias2.mutable_data_ptr()});
  if (layer.batch == 0) from_dz(0, 0);
  return gradients;
}

}  // namespace mtfast::concat_mlp
