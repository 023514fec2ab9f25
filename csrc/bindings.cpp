// Every op's schema, one a line: the table of contents. Each op's own .cpp registers its implementations,
// mtfast/ops/<op>.py its fake implementation and its derivative.
#include <torch/csrc/stable/library.h>

// clang-format off
STABLE_TORCH_LIBRARY(mtfast, m) {
  m.def("mask_tokens(Tensor input_ids, Tensor? positions, Tensor? cu_seqlens, Tensor? subword, int[] special_ids, int mask_token_id, int vocab_size, int seed, Tensor? seed_tensor, float mlm_probability, float mask_fraction, float random_fraction, bool exact) -> (Tensor, Tensor)");
  m.def("concat_mlp(Tensor u, Tensor v, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor? u_rows, Tensor? v_rows, int activation, float dropout_p, Tensor? seed, bool save_hidden) -> (Tensor, Tensor)");
  m.def("concat_mlp_backward(Tensor dy, Tensor u, Tensor v, Tensor weight1, Tensor weight2, Tensor z, Tensor? u_rows, Tensor? v_rows, int activation, float dropout_p, Tensor? seed, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("bias_gelu(Tensor x, Tensor? bias) -> Tensor");
  m.def("bias_gelu_backward(Tensor dy, Tensor x, Tensor? bias) -> (Tensor, Tensor)");
  m.def("dropout_add_layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor? x_bias, float dropout_p, float eps, Tensor? seed, bool save_stats) -> (Tensor, Tensor)");
  m.def("dropout_add_layer_norm_backward(Tensor dy, Tensor x, Tensor? residual, Tensor weight, Tensor? x_bias, Tensor stats, float dropout_p, Tensor? seed, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("packed_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float dropout_p, float softmax_scale, Tensor? seed) -> (Tensor, Tensor)");
  m.def("packed_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, Tensor cu_seqlens, SymInt max_seqlen, float dropout_p, float softmax_scale, Tensor? seed) -> (Tensor, Tensor, Tensor)");
  m.def("packed_attention_qkv(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, float dropout_p, float softmax_scale, Tensor? seed) -> (Tensor, Tensor)");
  m.def("packed_attention_qkv_backward(Tensor dout, Tensor qkv, Tensor out, Tensor stats, Tensor cu_seqlens, SymInt max_seqlen, float dropout_p, float softmax_scale, Tensor? seed) -> Tensor");
  m.def("packed_attention_cls(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float dropout_p, float softmax_scale, Tensor? seed) -> (Tensor, Tensor)");
  m.def("packed_attention_cls_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, Tensor cu_seqlens, SymInt max_seqlen, float dropout_p, float softmax_scale, Tensor? seed) -> (Tensor, Tensor, Tensor)");
}
// clang-format on
