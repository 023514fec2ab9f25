// What both directions of concat_mlp do to elements of the hidden layer: loads and stores of eight,
// activation, dropout.
#pragma once
#include "concat_mlp.h"
#include "device/element.cuh"

namespace mtfast::concat_mlp {

// ---- eight elements ----

template <class T>
struct alignas(16) Eight {
  T x[8];
};

// Columns column .. column + 7 of a row that has `inner`; those beyond read 0. Whole rows start on 16 bytes
// when `aligned`, and then so do eight columns.
template <class T>
__device__ __forceinline__ void load8(const T* row, int64_t column, int64_t inner, bool aligned,
                                      float (&out)[8]) {
  Eight<T> eight;
  if (aligned) {
    uint4 words[sizeof(Eight<T>) / 16] = {};
    if (column < inner) MTFAST_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(words) / 16); ++i)
      words[i] = reinterpret_cast<const uint4*>(row + column)[i];
    memcpy(&eight, words, sizeof eight);
  } else {
    MTFAST_UNROLL
    for (int i = 0; i < 8; ++i) {
      round_to(eight.x[i], 0.f);
      if (column + i < inner) eight.x[i] = row[column + i];
    }
  }
  MTFAST_UNROLL
  for (int i = 0; i < 8; ++i) out[i] = to_float(eight.x[i]);
}

template <class T>
__device__ __forceinline__ void store8(T* row, int64_t column, int64_t inner, bool aligned,
                                       const float (&in)[8]) {
  if (!aligned) {
    MTFAST_UNROLL
    for (int i = 0; i < 8; ++i)
      if (column + i < inner) round_to(row[column + i], in[i]);
  } else if (column < inner) {
    if constexpr (sizeof(T) == 2) {
      *reinterpret_cast<uint4*>(row + column) =
          make_uint4(pair_bits<T>(in[0], in[1]), pair_bits<T>(in[2], in[3]), pair_bits<T>(in[4], in[5]),
                     pair_bits<T>(in[6], in[7]));
    } else {
      *reinterpret_cast<float4*>(row + column) = make_float4(in[0], in[1], in[2], in[3]);
      *reinterpret_cast<float4*>(row + column + 4) = make_float4(in[4], in[5], in[6], in[7]);
    }
  }
}

// ---- activation and dropout ----

template <Activation activation>
__device__ __forceinline__ float activate(float x) {
  if constexpr (activation == Activation::kRelu) return x < 0.f ? 0.f : x;
  if constexpr (activation == Activation::kGelu) return 0.5f * x * (1.f + erff(x * 0.70710678f));
  return tanhf(x);
}

// h = act(x) and its slope there.
__device__ __forceinline__ void activate(Activation activation, float x, float& h, float& slope) {
  if (activation == Activation::kRelu) {
    h = x < 0.f ? 0.f : x;
    slope = x <= 0.f ? 0.f : 1.f;
  } else if (activation == Activation::kGelu) {
    const float cdf = 0.5f * (1.f + erff(x * 0.70710678f));
    h = x * cdf;
    slope = cdf + x * expf(-0.5f * x * x) * 0.39894228f;
  } else {
    h = tanhf(x);
    slope = 1.f - h * h;
  }
}

// The call whose words decide columns 2t, 2t + 1 of each of the four 8-wide tiles of 32 columns.
__device__ __forceinline__ Philox4 dropout_call(uint64_t seed, int64_t row, int64_t column, int t) {
  return philox(static_cast<uint32_t>(column / 32 * 4 + t), static_cast<uint32_t>(row), 0,
                static_cast<uint32_t>(Purpose::kConcatMlpDropout), seed);
}

__device__ __forceinline__ uint32_t word_of(const Philox4& call, int i) {
  const uint32_t low = i & 1 ? call.word[1] : call.word[0], high = i & 1 ? call.word[3] : call.word[2];
  return i & 2 ? high : low;
}

// Bit i: column + i is kept. The whole warp calls, with lane l at 8 columns that begin at 8 * (l % 4) of some
// 32: each lane makes one of the four calls for these and hands the words around.
__device__ __forceinline__ uint32_t kept_of_eight(uint64_t seed, int64_t row, int64_t column,
                                                  uint32_t threshold) {
  const int tile = static_cast<int>(threadIdx.x) & 3;
  const Philox4 call = dropout_call(seed, row, column, tile);
  uint32_t kept = 0;
  MTFAST_UNROLL
  for (int step = 0; step < 4; ++step) {
    const int t = tile ^ step;
    uint32_t word = word_of(call, t);
    if (step != 0) word = __shfl_xor_sync(0xffffffffu, word, step);
    kept |= (static_cast<uint32_t>((word & 0xffffu) >= threshold) | uint32_t{(word >> 16) >= threshold} << 1)
            << 2 * t;
  }
  return kept;
}

// ---- launches ----

inline bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline unsigned blocks(int64_t size, int64_t each) { return static_cast<unsigned>((size + each - 1) / each); }

}  // namespace mtfast::concat_mlp
