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

// Dropout: a weight is kept where its 16-bit draw is at least `threshold`. One Philox call gives the eight
// draws that a lane of a tensor core's 16 by 16 fragment holds: with key = seed and counter
//   (begin + row / 16 * 16 + row % 8, column / 16 * 4 + column % 8 / 2, head, Purpose::kAttentionDropout),
// where `begin` is the place of the sequence in the packed batch and row and column are counted from there,
// that of (row, column) is half column % 2 (0 the low one) of word 2 * (column % 16 / 8) + row % 16 / 8.
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

// The backward of 16-bit sequences of at most so many tokens is one pass on every GPU.
constexpr int kOnePassTokens = 64;

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

// Launch functions: 0 or a cudaError_t. Every row of every tensor begins on 16 bytes. delta: float [heads,
// total] of scratch; 16-bit batches without a sequence of more than kOnePassTokens need none.

// bfloat16 and float16 of head_dim 32, 64 and 128, on tensor cores.
extern "C" int mtfast_packed_attention_forward(const mtfast::AttentionForward* args, void* stream);
extern "C" int mtfast_packed_attention_backward(const mtfast::AttentionBackward* args, float* delta,
                                                void* stream);

// Row by row: float32, head_dim 256, and with `cls` all, which needs no delta.
extern "C" int mtfast_packed_attention_rows_forward(const mtfast::AttentionForward* args, int cls,
                                                    void* stream);
extern "C" int mtfast_packed_attention_rows_backward(const mtfast::AttentionBackward* args, int cls,
                                                     float* delta, void* stream);
