// The passes of concat_mlp over its hidden layer, as plain functions: no torch types.
//
//   h = act(z),  d = h * keep / (1 - p),  y = d @ weight2.T + bias2      with z = [u; v] @ weight1.T + bias1
//
// keep[row, column] comes from Philox with key `seed`, counter (column / 32 * 4 + column % 8 / 2, row, 0,
// Purpose::kConcatMlpDropout) and the 16-bit word 2 * (column % 32 / 8) + column % 2 of its output: dropped
// where the word is below `drop_below`. (A thread that holds columns 2t and 2t + 1 of four neighbouring
// 8-wide tiles, as tensor cores lay them out, needs one call; so does the CPU for 8 columns.)
#pragma once
#include <cstdint>

#include "device/philox.cuh"

namespace mtfast::concat_mlp {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };
enum class Activation { kRelu, kGelu, kTanh };

constexpr int kMaxOutputs = 8;

struct Layer {
  int64_t batch = 0, inner = 0;
  int outputs = 0;
  Dtype dtype = Dtype::kFloat32;
  Activation activation = Activation::kRelu;
  uint32_t drop_below = 0;  // of 65536; 0: no dropout
  double scale = 1.0;       // 1 / (1 - p)
};

// ---- CPU; every matrix is contiguous and of the layer's dtype ----

// y [batch, outputs] from z [batch, inner].
void cpu_forward(const Layer& layer, uint64_t seed, const void* z, const void* weight2, const void* bias2,
                 void* y);

// dz [batch, inner] (or null), dbias1 [inner], dweight2 [outputs, inner], dbias2 [outputs] from dy [batch,
// outputs].
void cpu_backward(const Layer& layer, uint64_t seed, const void* dy, const void* z, const void* weight2,
                  void* dz, void* dbias1, void* dweight2, void* dbias2);

}  // namespace mtfast::concat_mlp
