// What both directions of concat_mlp do to rows and to elements of the hidden layer: activation, dropout.
#pragma once
#include "concat_mlp.h"
#include "device/eight.cuh"
#include "device/gelu.cuh"

namespace mtfast::concat_mlp {

// ---- rows ----

// The row of `from` that row `i` of the product reads; -1 where there is none.
__device__ __forceinline__ int64_t source_row(const Source& from, int64_t i, int64_t batch) {
  if (i >= batch) return -1;
  int64_t row = i;
  if (from.rows != nullptr)
    row = from.wide_rows ? static_cast<const int64_t*>(from.rows)[i]
                         : static_cast<const int32_t*>(from.rows)[i];
  return row >= 0 && row < from.count ? row : -1;
}

// ---- activation and dropout ----

// x becomes h = act(x); slope is act's there. As exactly as T can tell.
template <class T>
__device__ __forceinline__ void activate(Activation activation, float (&x)[8], float (&slope)[8]) {
  const auto each = [&](const auto& of) {
    MTFAST_UNROLL
    for (int i = 0; i < 8; ++i) {
      of(x[i], slope[i]);
    }
  };
  if (activation == Activation::kRelu) {
    each([](float& x, float& slope) {
      slope = x <= 0.f ? 0.f : 1.f;
      x = x < 0.f ? 0.f : x;
    });
  } else if (activation == Activation::kGelu) {
    each([](float& x, float& slope) { gelu::value_and_slope<sizeof(T) == 2>(x, x, slope); });
  } else {
    each([](float& x, float& slope) {
      x = tanhf(x);
      slope = 1.f - x * x;
    });
  }
}

__device__ __forceinline__ uint64_t seed_of(const Layer& layer) {
  return layer.threshold != 0 ? static_cast<uint64_t>(__ldg(layer.seed)) : 0;
}

// Bit i: column + i is kept. The whole warp calls, with lane l at 8 columns that begin at 8 * (l % 4) of some
// 32: each lane makes one of the four calls for these and hands the words around.
__device__ __forceinline__ uint32_t kept_of_eight(uint32_t threshold, uint64_t seed, int64_t row,
                                                  int64_t column) {
  if (threshold == 0) return 0xff;
  const int tile = static_cast<int>(threadIdx.x) & 3;
  const Philox4 call = philox(static_cast<uint32_t>(column / 32 * 4 + tile), static_cast<uint32_t>(row), 0,
                              static_cast<uint32_t>(Purpose::kConcatMlpDropout), seed);
  uint32_t kept = 0;
  MTFAST_UNROLL
  for (int step = 0; step < 4; ++step) {
    const int t = tile ^ step;
    uint32_t word = call.at(t);
    if (step != 0) word = __shfl_xor_sync(0xffffffffu, word, step);
    kept |= (static_cast<uint32_t>((word & 0xffffu) >= threshold) | uint32_t{(word >> 16) >= threshold} << 1)
            << 2 * t;
  }
  return kept;
}

// x, eight columns of z, becomes d, as exactly as T can tell. The whole warp calls, as for kept_of_eight.
template <class T>
__device__ __forceinline__ void activate_and_drop(const Layer& layer, uint64_t seed, int64_t row,
                                                  int64_t column, float (&x)[8]) {
  float slope[8];
  const uint32_t kept = kept_of_eight(layer.threshold, seed, row, column);
  activate<T>(layer.activation, x, slope);
  MTFAST_UNROLL
  for (int i = 0; i < 8; ++i) {
    x[i] = kept >> i & 1 ? x[i] * static_cast<float>(layer.scale) : 0.f;
  }
}

// ---- launches ----

inline unsigned blocks(int64_t size, int64_t each) { return static_cast<unsigned>((size + each - 1) / each); }

}  // namespace mtfast::concat_mlp
