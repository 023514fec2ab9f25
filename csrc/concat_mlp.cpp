// concat_mlp: argument checks and registration. What follows is in concat_mlp_on_cpu.cpp and
// concat_mlp_on_cuda.cpp.
#include "concat_mlp_binding.h"

namespace mtfast::concat_mlp {
namespace {

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

// Checks the row indices, unless they lie on a GPU their values too.
template <bool kCuda>
Source source_of(const char* name, const Side& side) {
  const auto& [from, rows] = side;
  Source source{from.const_data_ptr(), from.stride(0), from.size(0)};
  if (!rows) return source;
  check(rows->dim() == 1 && rows->is_contiguous() && rows->device() == from.device(), "concat_mlp: ", name,
        "_rows must be a contiguous vector on the inputs' device");
  source.wide_rows = rows->scalar_type() == ScalarType::Long;
  check(source.wide_rows || rows->scalar_type() == ScalarType::Int, "concat_mlp: ", name,
        "_rows must be int32 or int64");
  if (!kCuda)
    (source.wide_rows ? check_in_range<int64_t> : check_in_range<int32_t>)(name, *rows, source.count);
  source.rows = rows->const_data_ptr();
  return source;
}

// Checks every operand but the biases.
template <bool kCuda>
Operands operands_of(const Side& u_side, const Side& v_side, const Tensor& weight1, const Tensor& weight2,
                     int64_t activation, double dropout_p, const OptionalTensor& seed) {
  const Tensor &u = u_side.from, &v = v_side.from;
  check(u.dim() == 2 && v.dim() == 2 && weight1.dim() == 2 && weight2.dim() == 2,
        "concat_mlp: u, v, weight1 and weight2 must be matrices");
  Layer layer;
  layer.hidden = u.size(1), layer.inner = weight1.size(0);
  check_matrix("u", u, u, u.size(0), layer.hidden);
  check_matrix("v", v, u, v.size(0), layer.hidden);
  check_matrix("weight1", weight1, u, layer.inner, 2 * layer.hidden);
  check_matrix("weight2", weight2, u, weight2.size(0), layer.inner);
  check_contiguous("concat_mlp", "weight1", weight1);
  check_contiguous("concat_mlp", "weight2", weight2);
  const Source from_u = source_of<kCuda>("u", u_side), from_v = source_of<kCuda>("v", v_side);
  const auto batch_of = [](const Side& side) { return (side.rows ? *side.rows : side.from).size(0); };
  layer.batch = batch_of(u_side);
  check(layer.batch == batch_of(v_side), "concat_mlp: u gives ", layer.batch, " rows and v gives ",
        batch_of(v_side));
  if (dropout_p != 0 || seed) {
    check_seed("concat_mlp", seed, "u", u);
    layer.seed = static_cast<const int64_t*>(seed->const_data_ptr());
  }
  check(weight2.size(0) >= 1 && weight2.size(0) <= kMaxOutputs, "concat_mlp: weight2 must have 1 to ",
        kMaxOutputs, " rows, found ", weight2.size(0));
  layer.outputs = static_cast<int>(weight2.size(0));
  layer.dtype = dtype_of("concat_mlp", "u", u);
  check(activation >= 0 && activation <= 2, "concat_mlp: unknown activation number ", activation);
  layer.activation = static_cast<Activation>(activation);
  check(dropout_p >= 0 && dropout_p < 1, "concat_mlp: dropout_p must be in [0, 1), found ", dropout_p);
  layer.threshold = dropout_threshold(dropout_p);
  layer.scale = 65536.0 / (65536.0 - layer.threshold);
  check(!kCuda || layer.dtype != Dtype::kFloat64,
        "concat_mlp: float64 is for the CPU; on CUDA u must be bfloat16, float16 or float32");
  const Inputs in{layer, from_u, from_v, weight1.const_data_ptr(), weight2.const_data_ptr()};
  return {in, u_side, v_side, weight1};
}

template <bool kCuda>
Forward forward(const Tensor& u, const Tensor& v, const Tensor& weight1, const Tensor& bias1,
                const Tensor& weight2, const Tensor& bias2, const OptionalTensor& u_rows,
                const OptionalTensor& v_rows, int64_t activation, double dropout_p,
                const OptionalTensor& seed, bool save_hidden) {
  Operands x = operands_of<kCuda>({u, u_rows}, {v, v_rows}, weight1, weight2, activation, dropout_p, seed);
  check_vector("bias1", bias1, u, x.in.layer.inner);
  check_vector("bias2", bias2, u, x.in.layer.outputs);
  x.in.bias1 = bias1.const_data_ptr();
  x.in.bias2 = bias2.const_data_ptr();
  if constexpr (kCuda)
    return forward_on_cuda(x, bias1, save_hidden);
  else
    return forward_on_cpu(x, bias1, save_hidden);
}

template <bool kCuda>
Gradients backward(const Tensor& dy, const Tensor& u, const Tensor& v, const Tensor& weight1,
                   const Tensor& weight2, const Tensor& z, const OptionalTensor& u_rows,
                   const OptionalTensor& v_rows, int64_t activation, double dropout_p,
                   const OptionalTensor& seed, int64_t needs) {
  const Operands x =
      operands_of<kCuda>({u, u_rows}, {v, v_rows}, weight1, weight2, activation, dropout_p, seed);
  check_matrix("dy", dy, u, x.in.layer.batch, x.in.layer.outputs);
  check_matrix("z", z, u, x.in.layer.batch, x.in.layer.inner);
  check(dy.is_contiguous() && z.is_contiguous(), "concat_mlp: dy and z must be contiguous");
  const Needs wanted{(needs & 1) != 0, (needs & 2) != 0, (needs & 4) != 0};
  if constexpr (kCuda)
    return backward_on_cuda(x, dy, z, wanted);
  else
    return backward_on_cpu(x, dy, z, wanted);
}

template <bool kCuda>
void register_all(Library& library) {
  library.impl("concat_mlp", TORCH_BOX(&forward<kCuda>));
  library.impl("concat_mlp_backward", TORCH_BOX(&backward<kCuda>));
}
MTFAST_REGISTER(register_all)

}  // namespace
}  // namespace mtfast::concat_mlp
