// The passes of concat_mlp over its hidden layer, as plain functions: no torch types.
//
//   h = act(z),  d = h * keep * scale,  y = d @ weight2.T + bias2      with z = [u; v] @ weight1.T + bias1
//
// keep[row, column] comes from Philox with key `seed`, counter (column / 32 * 4 + column % 8 / 2, row, 0,
// Purpose::kConcatMlpDropout) and the 16-bit word 2 * (column % 32 / 8) + column % 2 of its output: dropped
// where the word is below `threshold`. (Four threads with 8 columns each make one call each for these 32 and
// exchange the words; a thread with columns 2t and 2t + 1 of four neighbouring 8-wide tiles, as tensor cores
// lay them out, would need none of the others'.)
#pragma once
#include <cstdint>
#include <functional>

#include "device/philox.cuh"
#include "dtype.h"

namespace mtfast::concat_mlp {

enum class Activation { kRelu, kGelu, kTanh };

constexpr int kMaxOutputs = 8;

struct Layer {
  int64_t batch = 0, hidden = 0, inner = 0;
  int outputs = 0;
  Dtype dtype = Dtype::kFloat32;
  Activation activation = Activation::kRelu;
  uint32_t threshold = 0;         // of dropout, in 1/65536
  double scale = 1.0;             // of what is kept: 65536 / (65536 - threshold)
  const int64_t* seed = nullptr;  // on the tensors' device; may be null without dropout
};

// u or v: rows of `data`, or those that `rows` (int32 or int64, or null) names.
struct Source {
  const void* data;
  int64_t pitch, count;  // elements from one row to the next, rows there are
  const void* rows = nullptr;
  int32_t wide_rows = 0;  // int64
};

// What is read in either direction. The weights and biases are contiguous; the backward needs no biases.
struct Inputs {
  Layer layer;
  Source u, v;
  const void *weight1, *weight2;
  const void *bias1 = nullptr, *bias2 = nullptr;
};

// Of the gradients, those that are sums over the rows of the hidden layer's and of dy.
struct Sums {
  void *dbias1, *dweight2, *dbias2;
};

// ---- CPU; every matrix is contiguous and of the layer's dtype ----

// Rows begin .. end of y [batch, outputs], from those of the hidden layer, which z [end - begin, inner]
// holds.
void cpu_forward(const Inputs& in, int64_t begin, int64_t end, const void* z, void* y);

// Rows whose gradient cpu_backward has in memory at a time: half of a large batch, so that weight1's
// gradient, which is added up over the blocks, is rounded once more than necessary and no oftener.
int64_t cpu_backward_rows(int64_t batch);

// The sums from dy [batch, outputs]. dz [cpu_backward_rows, inner] (or null) receives the hidden layer's
// gradient block by block; done(begin, end) is called when it holds that of these rows.
void cpu_backward(const Inputs& in, const void* dy, const void* z, void* dz,
                  const std::function<void(int64_t begin, int64_t end)>& done, const Sums& sums);

// ---- CPU, bfloat16: the large products too, which read u and v where they are ----

// Whether the processor, the dtype and the sizes allow them.
bool cpu_multiplies(const Layer& layer);

// Rows begin .. end of z = [u; v] @ weight1.T + bias1, to z [end - begin, inner].
void cpu_hidden(const Inputs& in, int64_t begin, int64_t end, void* z);

// Rows begin .. end of du and dv (each [batch, hidden] or null) = dz [end - begin, inner] @ weight1, by
// halves.
void cpu_input_gradients(const Inputs& in, const void* dz, int64_t begin, int64_t end, void* du, void* dv);

// dweight1 [inner, 2 * hidden] = dz.T @ [u; v] over rows begin .. end, whose gradient of the hidden layer dz
// holds; added to what is there unless begin is 0. dz is reordered, and if its rows are odd needs room for
// one more.
void cpu_weight1_gradient(const Inputs& in, void* dz, int64_t begin, int64_t end, void* dweight1);

// ---- CUDA; a row out of range is not read, and makes its output NaN ----

constexpr int kSmallestTile = 64;  // columns of the hidden layer that a block of the forward covers, at least
constexpr int kChunkRows = 32;     // rows whose sums a block of the backward takes, or a multiple of them
constexpr int kMostChunks = 128;   // about: more would write sums for as long as the rows take

inline int64_t backward_chunk_rows(int64_t batch) {
  const int64_t most = kChunkRows * kMostChunks;
  return kChunkRows * (batch <= most ? 1 : (batch + most - 1) / most);
}
inline int64_t backward_chunks(int64_t batch) {
  return (batch + backward_chunk_rows(batch) - 1) / backward_chunk_rows(batch);
}
// Elements of dbias1 and dweight2, of which a chunk has sums in float; it has dbias2's in double.
MTFAST_HOST_DEVICE int64_t backward_float_sums(const Layer& layer) {
  return (1 + layer.outputs) * layer.inner;
}
inline int64_t backward_scratch_bytes(const Layer& layer) {
  return backward_chunks(layer.batch) *
         (layer.outputs * int64_t{sizeof(double)} + backward_float_sums(layer) * int64_t{sizeof(float)});
}

// Launch functions: 0 or a cudaError_t.
extern "C" {

// bfloat16 and float16: y [batch, outputs] and, unless null, z [batch, inner] in one pass of tensor cores.
// partial: float [ceil(inner / kSmallestTile), batch, outputs] of scratch.
int mtfast_concat_mlp_forward(const Inputs* in, void* z, float* partial, void* y, void* stream);

// float32: y from a z that is there.
int mtfast_concat_mlp_output(const Inputs* in, const void* z, void* y, void* stream);

// both [batch, 2 * hidden] = [u; v], for torch's products; a row out of range becomes NaN.
int mtfast_concat_mlp_gather(const Inputs* in, void* both, void* stream);

// As cpu_backward, but for dz [batch, inner] (or null). partial: backward_scratch_bytes(layer) of scratch.
int mtfast_concat_mlp_backward(const Inputs* in, const void* dy, const void* z, void* dz, double* partial,
                               const Sums* sums, void* stream);
}

}  // namespace mtfast::concat_mlp
