// The passes of dropout_add_layer_norm over its rows, as plain functions: no torch types.
//
//   s = residual + keep * scale * (x + x_bias),  y = (s - mean) * rstd * weight + bias
//
// with mean and rstd = 1 / sqrt(variance + eps) of each row of s. A backward makes s again.
//
// keep[row, column] comes from Philox with key `seed` and counter (column / 8, row, 0,
// Purpose::kDropoutAddLayerNorm): dropped where half column % 2 (0 the low one) of word column % 8 / 2 is
// below `threshold`. So one call's 128 bits are the draws of the eight columns that a thread moves at a time.
#pragma once
#include <cstdint>

#include "device/philox.cuh"
#include "dtype.h"

namespace mtfast::dropout_add_layer_norm {

struct Layer {
  int64_t rows = 0, hidden = 0;
  Dtype dtype = Dtype::kFloat32;
  double eps = 0;
  uint32_t threshold = 0;         // of dropout, in 1/65536
  double scale = 1.0;             // of what is kept: 65536 / (65536 - threshold)
  const int64_t* seed = nullptr;  // on the tensors' device; may be null without dropout
};

// x and residual (or null) are [rows, hidden], the others (x_bias or null) [hidden]; all are contiguous and
// of the layer's dtype. The backward needs no bias.
struct Inputs {
  Layer layer;
  const void *x, *residual;
  const void *weight, *bias, *x_bias;
};

// What a backward adds up over the rows, in this order.
enum Sum { kWeight, kBias, kXBias, kSums };

// What a backward writes; null: not wanted. Without dropout dx and dresidual are equal, and dresidual null.
struct Gradients {
  void *dx, *dresidual;
  void *dweight, *dbias, *dx_bias;

  bool any_sum() const { return dweight != nullptr || dbias != nullptr || dx_bias != nullptr; }
};

// stats [rows, 2], float (double for kFloat64): mean and rstd of each row; null: not wanted.

// ---- CPU ----

void cpu_forward(const Inputs& in, void* y, void* stats);
void cpu_backward(const Inputs& in, const void* dy, const void* stats, const Gradients& to);

// ---- CUDA ----

// A backward's block sums a chunk of rows: at least 40, lest the sums be a tenth of what is moved, and so
// many that there are no more blocks than a large GPU has SMs, each of which has room for one.
constexpr int64_t kLeastChunkRows = 40, kMostChunks = 128;

inline int64_t chunk_rows(int64_t rows) {
  const int64_t least = (rows + kMostChunks - 1) / kMostChunks;
  return least < kLeastChunkRows ? kLeastChunkRows : (least + 7) / 8 * 8;
}
inline int64_t chunks(int64_t rows) { return (rows + chunk_rows(rows) - 1) / chunk_rows(rows); }

// Launch functions: 0 or a cudaError_t. partial: float [kSums, chunks(rows), hidden] of scratch, for a
// backward of which any of the sums is wanted.
extern "C" {
int mtfast_dropout_add_layer_norm_forward(const Inputs* in, void* y, float* stats, void* stream);
int mtfast_dropout_add_layer_norm_backward(const Inputs* in, const void* dy, const float* stats,
                                           const Gradients* to, float* partial, void* stream);
}

}  // namespace mtfast::dropout_add_layer_norm
