// Packed attention: argument checks, the tensors' layout, and registration.
#include "packed_attention.h"

#include <tuple>

#include "binding.h"

namespace mtfast {
namespace {

// x as [rows, heads, head_dim].
template <bool kCuda>
AttentionTensor layout(const char* op, const char* name, const Tensor& x, int64_t rows, const Tensor& like) {
  check(x.dim() == 3 && x.size(0) == rows && x.size(1) == like.size(1) && x.size(2) == like.size(2), op, ": ",
        name, " must be [", rows, ", ", like.size(1), ", ", like.size(2), "], found ", x.dim(),
        " dimensions, the first ", x.dim() > 0 ? x.size(0) : 0);
  check(x.scalar_type() == like.scalar_type(), op, ": ", name, " must have k's dtype");
  check_same_device(op, name, x, "k", like);
  check(x.numel() == 0 || x.stride(2) == 1, op, ": the last dimension of ", name,
        " must be contiguous, its stride is ", x.numel() ? x.stride(2) : 0);
  check(!kCuda || x.numel() == 0 || on_16_bytes(x), op, ": every row of ", name,
        " must begin at a multiple of 16 bytes: pass ", name, ".clone()");
  check(!kCuda || x.numel() == 0 || x.stride(0) <= INT32_MAX, op, ": the rows of ", name,
        " must be less than 2^31 elements apart, found ", x.stride(0));
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
}

// The k-th of a [total, 3, heads, head_dim] tensor's three parts.
AttentionTensor part(const Tensor& qkv, int64_t k) {
  char* data = static_cast<char*>(const_cast<void*>(qkv.const_data_ptr()));
  return {data + k * qkv.stride(1) * static_cast<int64_t>(qkv.element_size()), qkv.stride(0), qkv.stride(2)};
}

template <bool kCuda>
AttentionShape shape_of(const char* op, const char* name, const Tensor& like, int64_t heads, int64_t head_dim,
                        const Tensor& cu_seqlens, int64_t max_seqlen, double dropout_p, double softmax_scale,
                        const OptionalTensor& seed) {
  AttentionShape shape;
  shape.dtype = dtype_of(op, name, like);
  check(shape.dtype != Dtype::kFloat64 || !kCuda, op, ": float64 is for the CPU; on CUDA ", name,
        " must be bfloat16, float16 or float32");
  shape.total = like.size(0);
  shape.heads = heads;
  shape.head_dim = head_dim;
  check(head_dim == 32 || head_dim == 64 || head_dim == 128, op, ": head_dim must be 32, 64 or 128, found ",
        head_dim);
  check(shape.total < INT32_MAX, op, ": at most 2^31 - 2 tokens, found ", shape.total);
  check_same_device(op, "cu_seqlens", cu_seqlens, "k", like);
  check_cu_seqlens<kCuda>(op, cu_seqlens, shape.total);
  shape.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  shape.sequences = cu_seqlens.size(0) - 1;
  check(max_seqlen >= 0, op, ": max_seqlen must not be negative, found ", max_seqlen);
  if (!kCuda)
    for (int64_t s = 0; s < shape.sequences; ++s)
      check(shape.cu_seqlens[s + 1] - shape.cu_seqlens[s] <= max_seqlen, op, ": max_seqlen is ", max_seqlen,
            ", but sequence ", s, " has ", shape.cu_seqlens[s + 1] - shape.cu_seqlens[s], " tokens");
  shape.max_seqlen = max_seqlen;
  shape.softmax_scale = softmax_scale;
  check(dropout_p >= 0 && dropout_p < 1, op, ": dropout_p must be in [0, 1), found ", dropout_p);
  shape.threshold = dropout_threshold(dropout_p);
  if (shape.threshold == 0) return shape;
  check_seed(op, seed, "k", like);
  shape.seed = static_cast<const int64_t*>(seed->const_data_ptr());
  return shape;
}

ScalarType stats_dtype(const AttentionShape& shape) {
  return shape.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

Tensor new_stats(const AttentionShape& shape, const Tensor& like, int64_t rows) {
  return torch::stable::new_empty(like, {shape.heads, rows, 2}, stats_dtype(shape));
}

const void* data_of_stats(const char* op, const Tensor& stats, const AttentionShape& shape, int64_t rows,
                          const Tensor& like) {
  check(stats.dim() == 3 && stats.size(0) == shape.heads && stats.size(1) == rows && stats.size(2) == 2 &&
            stats.is_contiguous() && stats.scalar_type() == stats_dtype(shape),
        op, ": stats must be what the forward returned, [heads, rows of q, 2]");
  check_same_device(op, "stats", stats, "k", like);
  return stats.const_data_ptr();
}

void in_slots(int64_t slots, void (*body)(int64_t, void*), void* context) {
  torch::stable::parallel_for(0, slots, 1, [=](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) body(slot, context);
  });
}

// Whether CUDA takes it row by row, without tensor cores.
[[maybe_unused]] bool by_rows(const AttentionShape& shape, bool cls) {
  return cls || shape.dtype == Dtype::kFloat32;
}

template <bool kCuda>
void launch(const char* op, const AttentionForward& args, bool cls, const Tensor& like) {
  if (like.numel() == 0 && args.shape.sequences == 0) return;
  if constexpr (kCuda) {
#ifdef MTFAST_WITH_CUDA
    const OnDeviceOf device(like);
    check_launch(op, by_rows(args.shape, cls)
                         ? mtfast_packed_attention_rows_forward(&args, cls, device.stream())
                         : mtfast_packed_attention_forward(&args, device.stream()));
#endif
  } else {
    packed_attention_forward_cpu(args, cls, torch::stable::get_num_threads(), in_slots);
  }
}

template <bool kCuda>
void launch(const char* op, const AttentionBackward& args, bool cls, const Tensor& like) {
  if (like.numel() == 0 && args.shape.sequences == 0) return;
  if constexpr (kCuda) {
#ifdef MTFAST_WITH_CUDA
    const OnDeviceOf device(like);
    const AttentionShape& shape = args.shape;
    const bool rows = by_rows(shape, cls);
    const bool needs_delta = !cls && (rows || shape.max_seqlen > kOnePassTokens);
    const Tensor scratch =
        torch::stable::new_empty(like, {shape.heads, needs_delta ? shape.total : 0}, ScalarType::Float);
    float* delta = static_cast<float*>(scratch.mutable_data_ptr());
    check_launch(op, rows ? mtfast_packed_attention_rows_backward(&args, cls, delta, device.stream())
                          : mtfast_packed_attention_backward(&args, delta, device.stream()));
#endif
  } else {
    packed_attention_backward_cpu(args, cls, torch::stable::get_num_threads(), in_slots);
  }
}

template <bool kCuda, bool kCls>
std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& cu_seqlens, int64_t max_seqlen, double dropout_p,
                                   double softmax_scale, const OptionalTensor& seed) {
  const char* op = kCls ? "packed_attention_cls" : "packed_attention";
  check(k.dim() == 3, op, ": k must be [total, heads, head_dim], found ", k.dim(), " dimensions");
  AttentionForward args;
  args.shape = shape_of<kCuda>(op, "k", k, k.size(1), k.size(2), cu_seqlens, max_seqlen, dropout_p,
                               softmax_scale, seed);
  const int64_t rows = kCls ? args.shape.sequences : args.shape.total;
  args.q = layout<kCuda>(op, "q", q, rows, k);
  args.k = layout<kCuda>(op, "k", k, args.shape.total, k);
  args.v = layout<kCuda>(op, "v", v, args.shape.total, k);
  Tensor out = torch::stable::new_empty(k, {rows, args.shape.heads, args.shape.head_dim});
  Tensor stats = new_stats(args.shape, k, rows);
  args.out = layout<kCuda>(op, "out", out, rows, k);
  args.stats = stats.mutable_data_ptr();
  launch<kCuda>(op, args, kCls, q);
  return {out, stats};
}

template <bool kCuda, bool kCls>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout_any, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const Tensor& out, const Tensor& stats,
                                            const Tensor& cu_seqlens, int64_t max_seqlen, double dropout_p,
                                            double softmax_scale, const OptionalTensor& seed) {
  const char* op = kCls ? "packed_attention_cls_backward" : "packed_attention_backward";
  const Tensor dout = laid_out<kCuda>(dout_any);
  check(k.dim() == 3, op, ": k must be [total, heads, head_dim], found ", k.dim(), " dimensions");
  AttentionBackward args;
  args.shape = shape_of<kCuda>(op, "k", k, k.size(1), k.size(2), cu_seqlens, max_seqlen, dropout_p,
                               softmax_scale, seed);
  const int64_t rows = kCls ? args.shape.sequences : args.shape.total;
  args.q = layout<kCuda>(op, "q", q, rows, k);
  args.k = layout<kCuda>(op, "k", k, args.shape.total, k);
  args.v = layout<kCuda>(op, "v", v, args.shape.total, k);
  args.out = layout<kCuda>(op, "out", out, rows, k);
  args.dout = layout<kCuda>(op, "dout", dout, rows, k);
  args.stats = data_of_stats(op, stats, args.shape, rows, k);
  Tensor dq = torch::stable::new_empty(k, {rows, args.shape.heads, args.shape.head_dim});
  Tensor dk = torch::stable::new_empty(k, {args.shape.total, args.shape.heads, args.shape.head_dim});
  Tensor dv = torch::stable::new_empty(k, {args.shape.total, args.shape.heads, args.shape.head_dim});
  args.dq = layout<kCuda>(op, "dq", dq, rows, k);
  args.dk = layout<kCuda>(op, "dk", dk, args.shape.total, k);
  args.dv = layout<kCuda>(op, "dv", dv, args.shape.total, k);
  launch<kCuda>(op, args, kCls, q);
  return {dq, dk, dv};
}

template <bool kCuda>
AttentionShape qkv_shape(const char* op, const Tensor& qkv, const Tensor& cu_seqlens, int64_t max_seqlen,
                         double dropout_p, double softmax_scale, const OptionalTensor& seed) {
  check(qkv.dim() == 4 && qkv.size(1) == 3, op, ": qkv must be [total, 3, heads, head_dim], found ",
        qkv.dim(), " dimensions");
  return shape_of<kCuda>(op, "qkv", qkv, qkv.size(2), qkv.size(3), cu_seqlens, max_seqlen, dropout_p,
                         softmax_scale, seed);
}

template <bool kCuda>
std::tuple<Tensor, Tensor> forward_qkv(const Tensor& qkv_any, const Tensor& cu_seqlens, int64_t max_seqlen,
                                       double dropout_p, double softmax_scale, const OptionalTensor& seed) {
  const char* op = "packed_attention_qkv";
  const Tensor qkv = laid_out<kCuda>(qkv_any);
  AttentionForward args;
  args.shape = qkv_shape<kCuda>(op, qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale, seed);
  args.q = part(qkv, 0);
  args.k = part(qkv, 1);
  args.v = part(qkv, 2);
  Tensor out = torch::stable::new_empty(qkv, {args.shape.total, args.shape.heads, args.shape.head_dim});
  Tensor stats = new_stats(args.shape, qkv, args.shape.total);
  args.out = layout<kCuda>(op, "out", out, args.shape.total, out);
  args.stats = stats.mutable_data_ptr();
  launch<kCuda>(op, args, false, qkv);
  return {out, stats};
}

template <bool kCuda>
Tensor backward_qkv(const Tensor& dout_any, const Tensor& qkv_any, const Tensor& out, const Tensor& stats,
                    const Tensor& cu_seqlens, int64_t max_seqlen, double dropout_p, double softmax_scale,
                    const OptionalTensor& seed) {
  const char* op = "packed_attention_qkv_backward";
  const Tensor dout = laid_out<kCuda>(dout_any), qkv = laid_out<kCuda>(qkv_any);
  AttentionBackward args;
  args.shape = qkv_shape<kCuda>(op, qkv, cu_seqlens, max_seqlen, dropout_p, softmax_scale, seed);
  Tensor dqkv = torch::stable::empty_like(qkv);
  args.q = part(qkv, 0);
  args.k = part(qkv, 1);
  args.v = part(qkv, 2);
  args.dq = part(dqkv, 0);
  args.dk = part(dqkv, 1);
  args.dv = part(dqkv, 2);
  check(out.dim() == 3 && out.size(1) == args.shape.heads && out.size(2) == args.shape.head_dim &&
            out.scalar_type() == qkv.scalar_type(),
        op, ": out must be what the forward returned");
  check_same_device(op, "out", out, "qkv", qkv);
  args.out = layout<kCuda>(op, "out", out, args.shape.total, out);
  args.dout = layout<kCuda>(op, "dout", dout, args.shape.total, out);
  args.stats = data_of_stats(op, stats, args.shape, args.shape.total, qkv);
  launch<kCuda>(op, args, false, qkv);
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
