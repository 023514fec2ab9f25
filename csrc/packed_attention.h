// Attention inside each sequence of a packed batch: what the launch functions of both devices take.
#pragma once
#include <cstdint>

#include "device/philox.cuh"
#include "dtype.h"

namespace mtfast {

// Where element (row, head, 0) of a [rows, heads, head_dim] tensor lies; strides in elements, last dim
// contiguous.
struct AttentionTensor {
  void* data = nullptr;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
};

// Dropout: Philox 4x32-7 with key = seed and counter (row, column / 8, head, Purpose::kAttentionDropout),
// the row counted from the begin of the packed batch and the column from the begin of its sequence, gives
// eight 16-bit draws; column's is number column % 8. A weight is kept where its draw is at least `threshold`.
struct AttentionShape {
  const int32_t* cu_seqlens = nullptr;  // [sequences + 1]
  int64_t sequences = 0;
  int64_t total = 0;
  int64_t heads = 0;
  int64_t head_dim = 0;
  int64_t max_seqlen = 0;
  Dtype dtype = Dtype::kFloat32;
  double softmax_scale = 1.0;
  uint32_t threshold = 0;         // of dropout, in 1/65536
  const int64_t* seed = nullptr;  // on the tensors' device; may be null without dropout
};

// Tokens of a long sequence that a CUDA block takes at a time; sequences of at most as many are taken whole.
// 64, but for float rows so wide that then the backward's tiles would not fit into 99 KiB, the shared memory
// that a block has on compute capability 8.6, 8.9 and 12.x.
constexpr int attention_piece(Dtype dtype, int64_t head_dim) {
  return dtype == Dtype::kFloat32 && head_dim == 128 ? 32 : 64;
}

// q, out: [total, ...] or, with `cls`, [sequences, ...]: the one query of each sequence.
// stats: [heads, rows of q, 2], float (double for kFloat64): of a row's scores in powers of two the largest,
// and the sum of 2^(score - largest). A log-sum-exp alone would lose the sum beside a large score.
struct AttentionForward {
  AttentionShape shape;
  AttentionTensor q, k, v, out;
  void* stats = nullptr;
};

struct AttentionBackward {
  AttentionShape shape;
  AttentionTensor q, k, v, out, dout, dq, dk, dv;
  const void* stats = nullptr;  // for CUDA
};

// Runs body(slot) once for each slot in [0, slots), concurrently where it can.
using ParallelSlots = void (*)(int64_t slots, void (*body)(int64_t slot, void* context), void* context);

void packed_attention_forward_cpu(const AttentionForward& args, bool cls, int64_t slots,
                                  ParallelSlots parallel);
void packed_attention_backward_cpu(const AttentionBackward& args, bool cls, int64_t slots,
                                   ParallelSlots parallel);

}  // namespace mtfast

// Launch functions: 0 or a cudaError_t. Every row of every tensor begins on 16 bytes. delta is scratch, float
// [heads, total], needed where max_seqlen is more than a piece.
extern "C" int mtfast_packed_attention_forward(const mtfast::AttentionForward* args, void* stream);
extern "C" int mtfast_packed_attention_backward(const mtfast::AttentionBackward* args, float* delta,
                                                void* stream);
extern "C" int mtfast_packed_attention_cls_forward(const mtfast::AttentionForward* args, void* stream);
extern "C" int mtfast_packed_attention_cls_backward(const mtfast::AttentionBackward* args, void* stream);
