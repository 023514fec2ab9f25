// concat_mlp's way through the CPU, block of rows by block of rows: in bfloat16 the large products are our
// own where the processor allows it, otherwise torch's.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <cstring>

#include "concat_mlp_binding.h"

namespace mtfast::concat_mlp {
namespace {

constexpr int64_t kCopyGrain = 1 << 16;   // bytes that are worth a thread
constexpr int64_t kForwardRows = 1024;    // of the hidden layer, at a time
constexpr int64_t kProductColumns = 192;  // of weight1's gradient, at a time

uint64_t read_seed(const OptionalTensor& seed) { return seed ? static_cast<uint64_t>(*seed_of(seed)) : 0; }

// ---- our own products ----

// What they work in; nothing where torch's do the work.
struct ProductScratch {
  int64_t workers = 0, bytes = 0;
  std::optional<Tensor> memory;

  ProductScratch(const Operands& x, bool wanted) {
    if (!wanted || !cpu_multiplies(x.layer, x.hidden)) return;
    workers = torch::stable::get_num_threads();
    bytes = cpu_scratch_bytes(x.layer, x.hidden);
    memory = torch::stable::new_empty(x.u, {workers * bytes}, ScalarType::Byte);
  }
  explicit operator bool() const { return memory.has_value(); }
  CpuScratch get() { return {memory->mutable_data_ptr(), bytes, workers}; }
};

// Gradients of u's and v's rows begin .. end (each from there on, or null) and weight1's (or null).
void own_gradients(const Operands& x, const CpuScratch& scratch, void* dz, int64_t begin, int64_t end,
                   void* du, void* dv, void* dweight1) {
  if (du != nullptr || dv != nullptr)
    cpu_input_gradients(x.layer, scratch, dz, end - begin, source_of(x.weight1, std::nullopt), x.hidden, du,
                        dv);
  if (dweight1 != nullptr)
    cpu_weight1_gradient(x.layer, scratch, dz, source_of(x.u, x.u_rows), source_of(x.v, x.v_rows), x.hidden,
                         begin, end, dweight1);
}

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

// Rows begin .. end of `from`, or those that `rows` names, copied to `to` (`pitch` bytes from one to the
// next).
template <class Index>
void copy_rows(const Tensor& from, const Index* rows, int64_t begin, int64_t end, char* to, int64_t pitch) {
  const int64_t bytes = static_cast<int64_t>(from.element_size());
  const int64_t from_pitch = from.stride(0) * bytes, size = from.size(1) * bytes;
  if (size == 0) return;
  const auto* source = static_cast<const char*>(from.const_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kCopyGrain / std::max<int64_t>(1, size));
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t past) {
    for (int64_t i = first; i < past; ++i)
      std::memcpy(to + (i - begin) * pitch, source + (rows == nullptr ? i : rows[i]) * from_pitch,
                  static_cast<size_t>(size));
  });
}

void copy_rows(const Tensor& from, const OptionalTensor& rows, int64_t begin, int64_t end, char* to,
               int64_t pitch) {
  const void* index = rows ? rows->const_data_ptr() : nullptr;
  if (rows && rows->scalar_type() == ScalarType::Int)
    copy_rows(from, static_cast<const int32_t*>(index), begin, end, to, pitch);
  else
    copy_rows(from, static_cast<const int64_t*>(index), begin, end, to, pitch);
}

// Rows begin .. end of what a product reads: of `from` itself, or a copy of those `rows` names.
Tensor picked(const Tensor& from, const OptionalTensor& rows, int64_t begin, int64_t end) {
  if (!rows) return rows_of(from, begin, end);
  Tensor out = torch::stable::new_empty(from, {end - begin, from.size(1)});
  copy_rows(from, rows, begin, end, static_cast<char*>(out.mutable_data_ptr()),
            from.size(1) * static_cast<int64_t>(from.element_size()));
  return out;
}

// z [end - begin, inner] = [u; v] @ weight1.T + bias1 for rows begin .. end. In 16 bits a rounding between
// the two halves would turn signs around, so there the rows are laid side by side in `both`, which has room
// for as many; otherwise the halves are added up in z and `both` is left alone.
void hidden_rows(const Operands& x, const Tensor& bias1, Tensor& both, int64_t begin, int64_t end,
                 const Tensor& z) {
  if (x.u.element_size() > 2) {
    add_product(z, bias1, picked(x.u, x.u_rows, begin, end), transposed(half(x.weight1, 0)));
    add_product(z, z, picked(x.v, x.v_rows, begin, end), transposed(half(x.weight1, 1)));
    return;
  }
  const int64_t side = x.hidden * static_cast<int64_t>(x.u.element_size());
  auto* to = static_cast<char*>(both.mutable_data_ptr());
  copy_rows(x.u, x.u_rows, begin, end, to, 2 * side);
  copy_rows(x.v, x.v_rows, begin, end, to + side, 2 * side);
  add_product(z, bias1, rows_of(both, 0, end - begin), transposed(x.weight1));
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

Forward forward_on_cpu(const Operands& x, const Tensor& bias1, const Tensor& bias2, bool save_hidden) {
  const int64_t batch = x.layer.batch, inner = x.layer.inner;
  ProductScratch scratch(x, true);
  const int64_t block = scratch && save_hidden ? batch : std::min(kForwardRows, batch);
  const bool lays_out = x.u.element_size() == 2 && !scratch;
  Tensor y = torch::stable::new_empty(x.u, {batch, x.layer.outputs});
  Tensor z = torch::stable::new_empty(x.u, {save_hidden ? batch : block, inner});
  Tensor both = torch::stable::new_empty(x.u, {lays_out ? block : 0, 2 * x.hidden});
  for (int64_t begin = 0; begin < batch; begin += block) {
    const int64_t end = std::min(batch, begin + block), at = save_hidden ? begin : 0;
    const Tensor part = rows_of(z, at, at + end - begin);
    if (scratch)
      cpu_hidden(x.layer, scratch.get(), source_of(x.u, x.u_rows), source_of(x.v, x.v_rows), x.hidden,
                 source_of(x.weight1, std::nullopt), bias1.const_data_ptr(), begin, end,
                 part.mutable_data_ptr());
    else
      hidden_rows(x, bias1, both, begin, end, part);
    cpu_forward(x.layer, read_seed(x.seed), begin, end, part.const_data_ptr(), x.weight2.const_data_ptr(),
                bias2.const_data_ptr(), y.mutable_data_ptr());
  }
  return {y, save_hidden ? z : torch::stable::new_empty(x.u, {0, inner})};
}

Gradients backward_on_cpu(const Operands& x, const Tensor& dy, const Tensor& z, const Needs& needs) {
  Gradients gradients = empty_gradients(x, needs);
  auto& [dinputs, dweight1, dbias1, dweight2, dbias2] = gradients;
  const int64_t batch = x.layer.batch, block = cpu_backward_rows(batch);
  ProductScratch scratch(x, needs.hidden_layer());
  const int64_t dz_rows = scratch ? block + block % 2 : block;  // our own products take rows in pairs
  Tensor dz = torch::stable::new_empty(x.u, {needs.hidden_layer() ? dz_rows : 0, x.layer.inner});
  void* dz_at = needs.hidden_layer() ? dz.mutable_data_ptr() : nullptr;
  std::optional<Tensor> du, dv;
  if (needs.u) du = torch::stable::select(dinputs, 0, 0);
  if (needs.v) dv = torch::stable::select(dinputs, 0, needs.u);
  // What follows from the gradient of rows begin .. end of the hidden layer, which dz then holds.
  const auto from_dz = [&](int64_t begin, int64_t end) {
    if (!needs.hidden_layer()) return;
    if (scratch) {
      const auto from_begin = [&](const std::optional<Tensor>& to) {
        return to ? rows_of(*to, begin, end).mutable_data_ptr() : nullptr;
      };
      own_gradients(x, scratch.get(), dz_at, begin, end, from_begin(du), from_begin(dv),
                    needs.weight1 ? dweight1.mutable_data_ptr() : nullptr);
      return;
    }
    const Tensor part = rows_of(dz, 0, end - begin);
    if (du) product(rows_of(*du, begin, end), part, half(x.weight1, 0));
    if (dv) product(rows_of(*dv, begin, end), part, half(x.weight1, 1));
    if (!needs.weight1) return;
    // The scratch that torch's library takes for this product in 16 bits grows with the columns: where du and
    // dv are in memory too, fewer at a time.
    const int64_t columns = x.u.element_size() == 2 && needs.sides() > 0 ? kProductColumns : x.hidden;
    add_to_weight1(half(dweight1, 0), part, picked(x.u, x.u_rows, begin, end), columns, begin == 0);
    add_to_weight1(half(dweight1, 1), part, picked(x.v, x.v_rows, begin, end), columns, begin == 0);
  };
  cpu_backward(x.layer, read_seed(x.seed), dy.const_data_ptr(), z.const_data_ptr(),
               x.weight2.const_data_ptr(), dz_at, from_dz, dbias1.mutable_data_ptr(),
               dweight2.mutable_data_ptr(), dbias2.mutable_data_ptr());
  if (batch == 0) from_dz(0, 0);
  return gradients;
}

}  // namespace mtfast::concat_mlp
