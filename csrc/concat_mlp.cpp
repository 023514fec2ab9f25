// concat_mlp: argument checks, the matrix products through torch's own library where they are not ours, and
// registration.
#include "concat_mlp.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#if defined(MTFAST_WITH_CUDA) && !defined(MTFAST_CUDA_ON_CPU)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#endif

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <tuple>

#include "binding.h"

namespace mtfast::concat_mlp {
namespace {

Layer layer_of(const Tensor& u, int64_t batch, const Tensor& weight1, const Tensor& weight2,
               int64_t activation, double dropout_p) {
  Layer layer;
  layer.batch = batch;
  layer.inner = weight1.size(0);
  check(weight2.size(0) >= 1 && weight2.size(0) <= kMaxOutputs, "concat_mlp: weight2 must have 1 to ",
        kMaxOutputs, " rows, found ", weight2.size(0));
  layer.outputs = static_cast<int>(weight2.size(0));
  layer.dtype = dtype_of("concat_mlp", "u", u);
  check(activation >= 0 && activation <= 2, "concat_mlp: unknown activation number ", activation);
  layer.activation = static_cast<Activation>(activation);
  check(dropout_p >= 0 && dropout_p < 1, "concat_mlp: dropout_p must be in [0, 1), found ", dropout_p);
  layer.threshold = dropout_threshold(dropout_p);
  layer.scale = 65536.0 / (65536.0 - layer.threshold);
  return layer;
}

void check_matrix(const char* name, const Tensor& t, const Tensor& u, int64_t rows, int64_t columns) {
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, "concat_mlp: ", name, " must be [", rows,
        ", ", columns, "]");
  check(t.scalar_type() == u.scalar_type(), "concat_mlp: ", name, " and u must be of one dtype");
  check(t.device() == u.device(), "concat_mlp: ", name, " and u must be on one device");
  check(t.stride(1) == 1 || t.size(1) == 1 || t.numel() == 0, "concat_mlp: the rows of ", name,
        " must be contiguous");
}

void check_vector(const char* name, const Tensor& t, const Tensor& u, int64_t size) {
  check(t.dim() == 1 && t.size(0) == size, "concat_mlp: ", name, " must be [", size, "]");
  check(t.scalar_type() == u.scalar_type() && t.device() == u.device() && t.is_contiguous(),
        "concat_mlp: ", name, " must be contiguous, of u's dtype and on its device");
}

template <class Index>
void check_in_range(const char* name, const Tensor& rows, int64_t size) {
  const auto* row = static_cast<const Index*>(rows.const_data_ptr());
  for (int64_t i = 0; i < rows.size(0); ++i)
    check(row[i] >= 0 && row[i] < size, "concat_mlp: ", name, "_rows[", i, "] is ", row[i], ", but ", name,
          " has ", size, " rows");
}

// Checks the row indices, unless they lie on a GPU their values too, and returns how many rows there are.
template <bool kCuda>
int64_t check_rows(const char* name, const OptionalTensor& rows, const Tensor& from) {
  if (!rows) return from.size(0);
  check(rows->dim() == 1 && rows->is_contiguous() && rows->device() == from.device(), "concat_mlp: ", name,
        "_rows must be a contiguous vector on the inputs' device");
  const bool wide = rows->scalar_type() == ScalarType::Long;
  check(wide || rows->scalar_type() == ScalarType::Int, "concat_mlp: ", name, "_rows must be int32 or int64");
  if (!kCuda) (wide ? check_in_range<int64_t> : check_in_range<int32_t>)(name, *rows, from.size(0));
  return rows->size(0);
}

// Checks every operand and returns the batch size.
template <bool kCuda>
int64_t check_operands(const Tensor& u, const Tensor& v, const Tensor& weight1, const Tensor& weight2,
                       const OptionalTensor& u_rows, const OptionalTensor& v_rows, const OptionalTensor& seed,
                       double dropout_p) {
  check(u.dim() == 2 && v.dim() == 2 && weight1.dim() == 2 && weight2.dim() == 2,
        "concat_mlp: u, v, weight1 and weight2 must be matrices");
  const int64_t hidden = u.size(1), inner = weight1.size(0);
  check_matrix("u", u, u, u.size(0), hidden);
  check_matrix("v", v, u, v.size(0), hidden);
  check_matrix("weight1", weight1, u, inner, 2 * hidden);
  check_matrix("weight2", weight2, u, weight2.size(0), inner);
  check_contiguous("concat_mlp", "weight1", weight1);
  check_contiguous("concat_mlp", "weight2", weight2);
  const int64_t batch = check_rows<kCuda>("u", u_rows, u), v_batch = check_rows<kCuda>("v", v_rows, v);
  check(batch == v_batch, "concat_mlp: u gives ", batch, " rows and v gives ", v_batch);
  if (dropout_p != 0 || seed) check_seed("concat_mlp", seed, "u", u);
  return batch;
}

// ---- matrix products: torch's own ----

constexpr int64_t kCopyGrain = 1 << 16;   // bytes that are worth a thread
constexpr int64_t kForwardRows = 1024;    // of the hidden layer, at a time, on the CPU
constexpr int64_t kProductColumns = 192;  // of weight1's gradient, at a time

// torch's function of the device that `out` is on.
#if defined(MTFAST_WITH_CUDA) && !defined(MTFAST_CUDA_ON_CPU)
#define MTFAST_TORCH(function, out, ...)                                                        \
  TORCH_ERROR_CODE_CHECK((out).is_cuda() ? aoti_torch_cuda_##function((out).get(), __VA_ARGS__) \
                                         : aoti_torch_cpu_##function((out).get(), __VA_ARGS__))
#else
#define MTFAST_TORCH(function, out, ...) \
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_##function((out).get(), __VA_ARGS__))
#endif

void product(const Tensor& out, const Tensor& a, const Tensor& b) {
  MTFAST_TORCH(mm_out, out, a.get(), b.get());
}

// out = to + a @ b
void add_product(const Tensor& out, const Tensor& to, const Tensor& a, const Tensor& b) {
  MTFAST_TORCH(addmm_out, out, to.get(), a.get(), b.get(), 1.0, 1.0);
}

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

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
template <bool kCuda>
Tensor rows_of(const Tensor& from, const OptionalTensor& rows, int64_t begin, int64_t end) {
  Tensor source = rows ? *rows : from;
  const Tensor part = torch::stable::narrow(source, 0, begin, end - begin);
  if (!rows) return part;
  if constexpr (kCuda) {
    std::array<StableIValue, 3> stack{torch::stable::detail::from(from),
                                      torch::stable::detail::from(int64_t{0}),
                                      torch::stable::detail::from(part)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  Tensor out = torch::stable::new_empty(from, {end - begin, from.size(1)});
  copy_rows(from, rows, begin, end, static_cast<char*>(out.mutable_data_ptr()),
            from.size(1) * static_cast<int64_t>(from.element_size()));
  return out;
}

// z [end - begin, inner] = [u; v] @ weight1.T + bias1 for rows begin .. end. In 16 bits a rounding between
// the two halves would turn signs around, so there the rows are laid side by side in `both`, which has room
// for as many; otherwise the halves are added up in z and `both` is left alone.
template <bool kCuda>
void hidden_rows(const Tensor& z, Tensor& both, const Tensor& u, const Tensor& v, const Tensor& weight1,
                 const Tensor& bias1, const OptionalTensor& u_rows, const OptionalTensor& v_rows,
                 int64_t begin, int64_t end) {
  if (u.element_size() > 2) {
    add_product(z, bias1, rows_of<kCuda>(u, u_rows, begin, end), transposed(half(weight1, 0)));
    add_product(z, z, rows_of<kCuda>(v, v_rows, begin, end), transposed(half(weight1, 1)));
    return;
  }
  const int64_t side = u.size(1) * static_cast<int64_t>(u.element_size());
  auto* to = static_cast<char*>(both.mutable_data_ptr());
  copy_rows(u, u_rows, begin, end, to, 2 * side);
  copy_rows(v, v_rows, begin, end, to + side, 2 * side);
  add_product(z, bias1, torch::stable::narrow(both, 0, 0, end - begin), transposed(weight1));
}

// ---- the passes over the hidden layer ----

const int64_t* seed_of(const OptionalTensor& seed) {
  return seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr;
}

uint64_t read_seed(const OptionalTensor& seed) { return seed ? static_cast<uint64_t>(*seed_of(seed)) : 0; }

Source source_of(const Tensor& from, const OptionalTensor& rows) {
  return {from.const_data_ptr(), from.stride(0), from.size(0), rows ? rows->const_data_ptr() : nullptr,
          rows && rows->scalar_type() == ScalarType::Long};
}

#ifdef MTFAST_WITH_CUDA
Tensor scratch_like(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {size}, ScalarType::Float);
}
#endif

// What the CPU's own products work in.
struct ProductScratch {
  int64_t workers, bytes;
  Tensor memory;

  ProductScratch(const Layer& layer, const Tensor& u)
      : workers(torch::stable::get_num_threads()),
        bytes(cpu_scratch_bytes(layer, u.size(1))),
        memory(torch::stable::new_empty(u, {workers * bytes}, ScalarType::Byte)) {}
  CpuScratch get() { return {memory.mutable_data_ptr(), bytes, workers}; }
};

template <bool kCuda>
std::tuple<Tensor, Tensor> forward(const Tensor& u, const Tensor& v, const Tensor& weight1,
                                   const Tensor& bias1, const Tensor& weight2, const Tensor& bias2,
                                   const OptionalTensor& u_rows, const OptionalTensor& v_rows,
                                   int64_t activation, double dropout_p, const OptionalTensor& seed,
                                   bool save_hidden) {
  const int64_t batch = check_operands<kCuda>(u, v, weight1, weight2, u_rows, v_rows, seed, dropout_p);
  const Layer layer = layer_of(u, batch, weight1, weight2, activation, dropout_p);
  check_vector("bias1", bias1, u, layer.inner);
  check_vector("bias2", bias2, u, layer.outputs);
  Tensor y = torch::stable::new_empty(u, {batch, layer.outputs});
  const bool in_one = kCuda && u.element_size() == 2;  // the product too is a kernel of our own
  const bool multiplies = !kCuda && cpu_multiplies(layer, u.size(1));
  const int64_t block = kCuda || (multiplies && save_hidden) ? batch : std::min(kForwardRows, batch);
  Tensor z = torch::stable::new_empty(u, {save_hidden ? batch : in_one ? 0 : block, layer.inner});
  if (batch == 0) return {y, z};
  if constexpr (kCuda) {
#ifdef MTFAST_WITH_CUDA
    check(layer.dtype != Dtype::kFloat64,
          "concat_mlp: float64 is for the CPU; on CUDA u must be bfloat16, float16 or ", "float32");
    const OnDeviceOf device(u);
    if (in_one) {
      Tensor partial =
          scratch_like(u, (layer.inner + kSmallestTile - 1) / kSmallestTile * batch * layer.outputs);
      const Source from_u = source_of(u, u_rows), from_v = source_of(v, v_rows);
      check_launch("concat_mlp", mtfast_concat_mlp_forward(
                                     &layer, &from_u, &from_v, u.size(1), weight1.const_data_ptr(),
                                     bias1.const_data_ptr(), weight2.const_data_ptr(), bias2.const_data_ptr(),
                                     seed_of(seed), save_hidden ? z.mutable_data_ptr() : nullptr,
                                     static_cast<float*>(partial.mutable_data_ptr()), y.mutable_data_ptr(),
                                     device.stream()));
    } else {
      hidden_rows<kCuda>(z, z, u, v, weight1, bias1, u_rows, v_rows, 0, batch);
      check_launch("concat_mlp",
                   mtfast_concat_mlp_output(&layer, z.const_data_ptr(), weight2.const_data_ptr(),
                                            bias2.const_data_ptr(), seed_of(seed), y.mutable_data_ptr(),
                                            device.stream()));
    }
#endif
  } else {
    const int64_t hidden = u.size(1);
    Tensor both = torch::stable::new_empty(u, {u.element_size() == 2 && !multiplies ? block : 0, 2 * hidden});
    std::optional<ProductScratch> scratch;
    if (multiplies) scratch.emplace(layer, u);
    for (int64_t begin = 0; begin < batch; begin += block) {
      const int64_t end = std::min(batch, begin + block);
      const Tensor part = torch::stable::narrow(z, 0, save_hidden ? begin : 0, end - begin);
      if (multiplies)
        cpu_hidden(layer, scratch->get(), source_of(u, u_rows), source_of(v, v_rows), hidden,
                   source_of(weight1, std::nullopt), bias1.const_data_ptr(), begin, end,
                   part.mutable_data_ptr());
      else
        hidden_rows<kCuda>(part, both, u, v, weight1, bias1, u_rows, v_rows, begin, end);
      cpu_forward(layer, read_seed(seed), begin, end, part.const_data_ptr(), weight2.const_data_ptr(),
                  bias2.const_data_ptr(), y.mutable_data_ptr());
    }
  }
  if (!save_hidden) z = torch::stable::new_empty(u, {0, layer.inner});
  return {y, z};
}

// Gradients of u's and v's rows, weight1, bias1, weight2, bias2; those of the first three that `needs` (one
// bit each) does not ask for come back empty.
template <bool kCuda>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& u, const Tensor& v, const Tensor& weight1, const Tensor& weight2,
    const Tensor& z, const OptionalTensor& u_rows, const OptionalTensor& v_rows, int64_t activation,
    double dropout_p, const OptionalTensor& seed, int64_t needs) {
  const int64_t batch = check_operands<kCuda>(u, v, weight1, weight2, u_rows, v_rows, seed, dropout_p);
  const Layer layer = layer_of(u, batch, weight1, weight2, activation, dropout_p);
  check_matrix("dy", dy, u, batch, layer.outputs);
  check_matrix("z", z, u, batch, layer.inner);
  check(dy.is_contiguous() && z.is_contiguous(), "concat_mlp: dy and z must be contiguous");
  const bool need_u = needs & 1, need_v = needs & 2, need_weight1 = needs & 4;
  const bool need_dz = need_u || need_v || need_weight1;
  const int64_t hidden = u.size(1), block = kCuda ? batch : cpu_backward_rows(batch);
  std::optional<ProductScratch> scratch;
  if (!kCuda && need_dz && cpu_multiplies(layer, hidden)) scratch.emplace(layer, u);
  const int64_t dz_rows = scratch ? block + block % 2 : block;  // our own products take rows in pairs
  Tensor dz = torch::stable::new_empty(u, {need_dz ? dz_rows : 0, layer.inner});
  Tensor du = torch::stable::new_empty(u, {need_u ? batch : 0, hidden});
  Tensor dv = torch::stable::new_empty(u, {need_v ? batch : 0, hidden});
  Tensor dweight1 = torch::stable::new_empty(u, {need_weight1 ? layer.inner : 0, 2 * hidden});
  Tensor dbias1 = torch::stable::new_empty(u, {layer.inner});
  Tensor dweight2 = torch::stable::new_empty(u, {layer.outputs, layer.inner});
  Tensor dbias2 = torch::stable::new_empty(u, {layer.outputs});
  void* dz_at = need_dz ? dz.mutable_data_ptr() : nullptr;
  // What follows from the gradient of rows begin .. end of the hidden layer, which dz then holds.
  const auto from_dz = [&](int64_t begin, int64_t end) {
    if (!need_dz) return;
    if constexpr (!kCuda) {
      if (scratch) {
        const auto rows_at = [&](Tensor to) {
          return torch::stable::narrow(to, 0, begin, end - begin).mutable_data_ptr();
        };
        if (need_u || need_v)
          cpu_input_gradients(layer, scratch->get(), dz_at, end - begin, source_of(weight1, std::nullopt),
                              hidden, need_u ? rows_at(du) : nullptr, need_v ? rows_at(dv) : nullptr);
        if (need_weight1)
          cpu_weight1_gradient(layer, scratch->get(), dz_at, source_of(u, u_rows), source_of(v, v_rows),
                               hidden, begin, end, dweight1.mutable_data_ptr());
        return;
      }
    }
    const Tensor part = torch::stable::narrow(dz, 0, 0, end - begin);
    if (need_u) product(torch::stable::narrow(du, 0, begin, end - begin), part, half(weight1, 0));
    if (need_v) product(torch::stable::narrow(dv, 0, begin, end - begin), part, half(weight1, 1));
    if (!need_weight1) return;
    // The scratch that torch's library takes for this product in 16 bits grows with the columns: where du and
    // dv are in memory too, fewer at a time.
    const bool in_parts = !kCuda && u.element_size() == 2 && (need_u || need_v);
    const int64_t columns = in_parts ? kProductColumns : hidden;
    const auto add = [&](const Tensor& whole, const Tensor& rows) {
      for (int64_t first = 0; first < hidden; first += columns) {
        const int64_t count = std::min(columns, hidden - first);
        const Tensor out = columns_of(whole, first, count), from = columns_of(rows, first, count);
        if (begin == 0)
          product(out, transposed(part), from);
        else
          add_product(out, out, transposed(part), from);
      }
    };
    add(half(dweight1, 0), rows_of<kCuda>(u, u_rows, begin, end));
    add(half(dweight1, 1), rows_of<kCuda>(v, v_rows, begin, end));
  };
  if constexpr (kCuda) {
#ifdef MTFAST_WITH_CUDA
    const OnDeviceOf device(u);
    Tensor partial = scratch_like(u, backward_chunks(batch) * (1 + layer.outputs) * layer.inner);
    check_launch("concat_mlp",
                 mtfast_concat_mlp_backward(
                     &layer, dy.const_data_ptr(), z.const_data_ptr(), weight2.const_data_ptr(), seed_of(seed),
                     dz_at, static_cast<float*>(partial.mutable_data_ptr()), dbias1.mutable_data_ptr(),
                     dweight2.mutable_data_ptr(), dbias2.mutable_data_ptr(), device.stream()));
    from_dz(0, batch);
#endif
  } else {
    cpu_backward(layer, read_seed(seed), dy.const_data_ptr(), z.const_data_ptr(), weight2.const_data_ptr(),
                 dz_at, from_dz, dbias1.mutable_data_ptr(), dweight2.mutable_data_ptr(),
                 dbias2.mutable_data_ptr());
    if (batch == 0) from_dz(0, 0);
  }
  return {du, dv, dweight1, dbias1, dweight2, dbias2};
}

template <bool kCuda>
void register_all(Library& library) {
  library.impl("concat_mlp", TORCH_BOX(&forward<kCuda>));
  library.impl("concat_mlp_backward", TORCH_BOX(&backward<kCuda>));
}
MTFAST_REGISTER(register_all)

}  // namespace
}  // namespace mtfast::concat_mlp
