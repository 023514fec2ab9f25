// Packed attention: argument checks, the tensors' layout, and registration.
#include "packed_attention.h"

#include <algorithm>
#include <tuple>

#include "binding.h"

namespace mtfast {
namespace {

// Of k, or of q, k and v in one, against which all else is checked.
const char* name_of(const Tensor& like) { return like.dim() == 4 ? "qkv" : "k"; }

AttentionTensor place_of(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
}

// The i-th of a [total, 3, heads, head_dim] tensor's three parts.
AttentionTensor part_of(const Tensor& qkv, int64_t i) {
  char* data = static_cast<char*>(const_cast<void*>(qkv.const_data_ptr()));
  return {data + i * qkv.stride(1) * static_cast<int64_t>(qkv.element_size()), qkv.stride(0), qkv.stride(2)};
}

// x as [rows, heads, head_dim].
template <bool kCuda>
AttentionTensor layout(const char* op, const char* name, const Tensor& x, int64_t rows,
                       const AttentionShape& shape, const Tensor& like) {
  check(x.dim() == 3 && x.size(0) == rows && x.size(1) == shape.heads && x.size(2) == shape.head_dim, op,
        ": ", name, " must be [", rows, ", ", shape.heads, ", ", shape.head_dim, "], found ", x.dim(),
        " dimensions, the first ", x.dim() > 0 ? x.size(0) : 0);
  check(x.scalar_type() == like.scalar_type(), op, ": ", name, " must have ", name_of(like), "'s dtype");
  check_same_device(op, name, x, name_of(like), like);
  if (x.numel() == 0) return place_of(x);
  check(x.stride(2) == 1, op, ": the last dimension of ", name, " must be contiguous, its stride is ",
        x.stride(2));
  check(!kCuda || on_16_bytes(x), op, ": every row of ", name, " must begin at a multiple of 16 bytes: pass ",
        name, ".clone()");
  check(!kCuda || x.stride(0) <= INT32_MAX, op, ": the rows of ", name,
        " must be less than 2^31 elements apart, found ", x.stride(0));
  return place_of(x);
}

// `like`: k [total, heads, head_dim] or, `fused`, qkv [total, 3, heads, head_dim].
template <bool kCuda>
AttentionShape shape_of(const char* op, bool fused, const Tensor& like, const Tensor& cu_seqlens,
                        int64_t max_seqlen, double dropout_p, double softmax_scale,
                        const OptionalTensor& seed) {
  const char* name = fused ? "qkv" : "k";
  check(fused ? like.dim() == 4 && like.size(1) == 3 : like.dim() == 3, op, ": ", name, " must be [total, ",
        fused ? "3, " : "", "heads, head_dim], found ", like.dim(), " dimensions");
  AttentionShape shape;
  shape.dtype = dtype_of(op, name, like);
  check(shape.dtype != Dtype::kFloat64 || !kCuda, op, ": float64 is for the CPU; on CUDA ", name,
        " must be bfloat16, float16 or float32");
  shape.total = like.size(0);
  shape.heads = like.size(like.dim() - 2);
  shape.head_dim = like.size(like.dim() - 1);
  const int64_t dim = shape.head_dim;
  check(kCuda ? dim == 32 || dim == 64 || dim == 128 || dim == 256 : dim > 0 && dim % 16 == 0, op,
        ": head_dim must be ", kCuda ? "32, 64, 128 or 256" : "a multiple of 16", ", found ", dim);
  check(shape.total < INT32_MAX, op, ": at most 2^31 - 2 tokens, found ", shape.total);
  check_same_device(op, "cu_seqlens", cu_seqlens, name, like);
  check_cu_seqlens<kCuda>(op, cu_seqlens, shape.total);
  shape.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  shape.sequences = cu_seqlens.size(0) - 1;
  check(max_seqlen >= 0, op, ": max_seqlen must not be negative, found ", max_seqlen);
  if (!kCuda)
    for (int64_t s = 0; s < shape.sequences; ++s)
      check(shape.cu_seqlens[s + 1] - shape.cu_seqlens[s] <= max_seqlen, op, ": max_seqlen is ", max_seqlen,
            ", but sequence ", s, " has ", shape.cu_seqlens[s + 1] - shape.cu_seqlens[s], " tokens");
  shape.max_seqlen = std::min(max_seqlen, shape.total);  // which is an int
  shape.softmax_scale = softmax_scale;
  check(dropout_p >= 0 && dropout_p < 1, op, ": dropout_p must be in [0, 1), found ", dropout_p);
  shape.threshold = dropout_threshold(dropout_p);
  if (shape.threshold == 0) return shape;
  check_seed(op, seed, name, like);
  shape.seed = static_cast<const int64_t*>(seed->const_data_ptr());
  return shape;
}

ScalarType stats_dtype(const AttentionShape& shape) {
  return shape.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

void in_slots(int64_t slots, void (*body)(int64_t, void*), void* context) {
  torch::stable::parallel_for(0, slots, 1, [=](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) body(slot, context);
  });
}

// Whether CUDA takes it row by row, without tensor cores.
[[maybe_unused]] bool by_rows(const AttentionShape& shape, bool cls) {
  return cls || shape.dtype == Dtype::kFloat32 || shape.head_dim == 256;
}

// With all but the results in args.
template <bool kCuda>
std::tuple<Tensor, Tensor> forward_of(const char* op, AttentionForward& args, bool cls, const Tensor& like) {
  const AttentionShape& shape = args.shape;
  const int64_t rows = cls ? shape.sequences : shape.total;
  Tensor out = torch::stable::new_empty(like, {rows, shape.heads, shape.head_dim});
  Tensor stats = torch::stable::new_empty(like, {shape.heads, rows, 2}, stats_dtype(shape));
  args.out = place_of(out);
  args.stats = stats.mutable_data_ptr();
  if constexpr (kCuda) {
#ifdef MTFAST_WITH_CUDA
    const OnDeviceOf device(like);
    check_launch(op, by_rows(shape, cls) ? mtfast_packed_attention_rows_forward(&args, cls, device.stream())
                                         : mtfast_packed_attention_forward(&args, device.stream()));
#endif
  } else {
    packed_attention_forward_cpu(args, cls, torch::stable::get_num_threads(), in_slots);
  }
  return {out, stats};
}

// With q, k, v and the gradients' places in args.
template <bool kCuda>
void backward_of(const char* op, AttentionBackward& args, bool cls, const Tensor& dout_any, const Tensor& out,
                 const Tensor& stats, const Tensor& like) {
  const AttentionShape& shape = args.shape;
  const int64_t rows = cls ? shape.sequences : shape.total;
  const Tensor dout = laid_out<kCuda>(dout_any);
  args.out = layout<kCuda>(op, "out", out, rows, shape, like);
  args.dout = layout<kCuda>(op, "dout", dout, rows, shape, like);
  check(stats.dim() == 3 && stats.size(0) == shape.heads && stats.size(1) == rows && stats.size(2) == 2 &&
            stats.is_contiguous() && stats.scalar_type() == stats_dtype(shape),
        op, ": stats must be what the forward returned, [heads, rows of q, 2]");
  check_same_device(op, "stats", stats, name_of(like), like);
  args.stats = stats.const_data_ptr();
  if constexpr (kCuda) {
#ifdef MTFAST_WITH_CUDA
    const OnDeviceOf device(like);
    const bool one_pass = !by_rows(shape, cls) && shape.max_seqlen <= kOnePassTokens;
    const Tensor scratch =
        torch::stable::new_empty(like, {shape.heads, cls || one_pass ? 0 : rows}, ScalarType::Float);
    float* delta = static_cast<float*>(scratch.mutable_data_ptr());
    check_launch(op, by_rows(shape, cls)
                         ? mtfast_packed_attention_rows_backward(&args, cls, delta, device.stream())
                         : mtfast_packed_attention_backward(&args, delta, device.stream()));
#endif
  } else {
    packed_attention_backward_cpu(args, cls, torch::stable::get_num_threads(), in_slots);
  }
}

template <bool kCuda, class Args>
void take_inputs(const char* op, Args& args, bool cls, const Tensor& q, const Tensor& k, const Tensor& v) {
  args.q = layout<kCuda>(op, "q", q, cls ? args.shape.sequences : args.shape.total, args.shape, k);
  args.k = layout<kCuda>(op, "k", k, args.shape.total, args.shape, k);
  args.v = layout<kCuda>(op, "v", v, args.shape.total, args.shape, k);
}

template <class Args>
void take_inputs(Args& args, const Tensor& qkv) {
  args.q = part_of(qkv, 0);
  args.k = part_of(qkv, 1);
  args.v = part_of(qkv, 2);
}

template <bool kCuda, bool kCls>
std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& cu_seqlens, int64_t max_seqlen, double dropout_p,
                                   double softmax_scale, const OptionalTensor& seed) {
  const char* op = kCls ? "packed_attention_cls" : "packed_attention";
  AttentionForward args;
  args.shape = shape_of<kCuda>(op, false, k, cu_seqlens, max_seqlen, dropout_p, softmax_scale, seed);
  take_inputs<kCuda>(op, args, kCls, q, k, v);
  return forward_of<kCuda>(op, args, kCls, k);
}

template <bool kCuda, bool kCls>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const Tensor& out, const Tensor& stats,
                                            const Tensor& cu_seqlens, int64_t max_seqlen, double dropout_p,
                                            double softmax_scale, const OptionalTensor& seed) {
  const char* op = kCls ? "packed_attention_cls_backward" : "packed_attention_backward";
  AttentionBackward args;
  args.shape = shape_of<kCuda>(op, false, k, cu_seqlens, max_seqlen, dropout_p, softmax_scale, seed);
  take_inputs<kCuda>(op, args, kCls, q, k, v);
  const auto gradient = [&](const Tensor& of, AttentionTensor& place) {
    const Tensor made = torch::stable::new_empty(k, {of.size(0), args.shape.heads, args.shape.head_dim});
    place = place_of(made);
    return made;
  };
  Tensor dq = gradient(q, args.dq), dk = gradient(k, args.dk), dv = gradient(v, args.dv);
  backward_of<kCuda>(op, args, kCls, dout, out, stats, k);
  return {dq, dk, dv};
}

template <bool kCuda>
std::tuple<Tensor, Tensor> forward_qkv(const Tensor& qkv_any, const Tensor& cu_seqlens, int64_t max_seqlen,
                                       double dropout_p, double softmax_scale, const OptionalTensor& seed) {
  const char* op = "packed_attention_qkv";
  const Tensor qkv = laid_out<kCuda>(qkv_any);
  AttentionForward args;
  args.shape = shape_of<kCuda>(op, true, qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale, seed);
  take_inputs(args, qkv);
  return forward_of<kCuda>(op, args, false, qkv);
}

template <bool kCuda>
Tensor backward_qkv(const Tensor& dout, const Tensor& qkv_any, const Tensor& out, const Tensor& stats,
                    const Tensor& cu_seqlens, int64_t max_seqlen, double dropout_p, double softmax_scale,
                    const OptionalTensor& seed) {
  const char* op = "packed_attention_qkv_backward";
  const Tensor qkv = laid_out<kCuda>(qkv_any);
  AttentionBackward args;
  args.shape = shape_of<kCuda>(op, true, qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale, seed);
  take_inputs(args, qkv);
  Tensor dqkv = torch::stable::empty_like(qkv);
  args.dq = part_of(dqkv, 0);
  args.dk = part_of(dqkv, 1);
  args.dv = part_of(dqkv, 2);
  backward_of<kCuda>(op, args, false, dout, out, stats, qkv);
  return dqkv;
}

template <bool kCuda>
void register_all(Library& library) {
  library.impl("packed_attention", TORCH_BOX((&forward<kCuda, false>)));
  library.impl("packed_attention_backward", TORCH_BOX((&backward<kCuda, false>)));
  library.impl("packed_attention_qkv", TORCH_BOX((&forward_qkv<kCuda>)));
  library.impl("packed_attention_qkv_backward", TORCH_BOX((&backward_qkv<kCuda>)));
  library.impl("packed_attention_cls", TORCH_BOX((&forward<kCuda, true>)));
  library.impl("packed_attention_cls_backward", TORCH_BOX((&backward<kCuda, true>)));
}
MTFAST_REGISTER(register_all)

}  // namespace
}  // namespace mtfast
