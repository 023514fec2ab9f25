// What both directions of dropout_add_layer_norm on CUDA do with rows: where a thread's columns are, the sums
// of a row over its threads, vectors in shared memory, s made of what was read.
#pragma once
#include "device/eight.cuh"
#include "device/reduce.cuh"
#include "dropout_add_layer_norm.h"

namespace mtfast::dropout_add_layer_norm {

constexpr int kMostWarps = 16, kMostThreads = 32 * kMostWarps;
// A row of more is not held: in the kernels, kHeld says that a row is in registers from its load to its end,
// and that every row begins on 16 bytes.
constexpr int64_t kHeldColumns = 8 * kMostThreads;
constexpr int kRows = 2;  // that a thread has under way: more would not leave registers for as many warps

struct Eights {
  float of[kRows][8];
};

template <class T>
struct Operands {
  Layer layer;
  const T *x, *residual, *weight, *bias, *x_bias;
  int64_t chunk_rows;
  int warps;  // beside each other in a row
};

// A thread's place: its first columns in a row, and which of the rows that a block has under way are its.
struct Place {
  int warps, group, groups;
  int column, tile;  // tile: columns that the warps beside each other have

  __device__ __forceinline__ explicit Place(int warps)
      : warps(warps),
        group(static_cast<int>(threadIdx.x) / (32 * warps)),
        groups(static_cast<int>(blockDim.x) / (32 * warps)),
        column(static_cast<int>(threadIdx.x) % (32 * warps) * 8),
        tile(256 * warps) {}

  // f(column) for the thread's columns: once where the row is held.
  template <bool kHeld, class F>
  __device__ __forceinline__ void each_tile(int hidden, const F& f) const {
    if constexpr (kHeld) {
      f(column);
    } else {
      MTFAST_NO_UNROLL
      for (int first = column; first < hidden; first += tile) f(first);
    }
  }

  // Each value's sum over the threads of a row, in all of them. of_warps is [warps of the block, kCount], and
  // not the same as the last time. The whole block calls.
  template <int kCount>
  __device__ __forceinline__ void row_sums(float (&values)[kCount], float* of_warps) const {
    const int warp = static_cast<int>(threadIdx.x) / 32, first = group * warps;
    MTFAST_UNROLL
    for (int i = 0; i < kCount; ++i) values[i] = warp_sum(values[i]);
    if (warps == 1) return;
    if (threadIdx.x % 32 == 0) {
      MTFAST_UNROLL
      for (int i = 0; i < kCount; ++i) of_warps[warp * kCount + i] = values[i];
    }
    __syncthreads();
    MTFAST_UNROLL
    for (int i = 0; i < kCount; ++i) values[i] = of_warps[first * kCount + i];
    MTFAST_NO_UNROLL
    for (int w = first + 1; w < first + warps; ++w) {
      MTFAST_UNROLL
      for (int i = 0; i < kCount; ++i) values[i] += of_warps[w * kCount + i];
    }
  }
};

// The vectors of a layer where a thread finds its columns of them: in shared memory, padded with zeros, where
// rows are held.
template <class T, bool kHeld>
struct Vectors {
  const Operands<T>& in;
  T* shared;  // [vectors, tile]
  int tile;

  // `which` in shared memory; the whole block calls, and a barrier must follow.
  __device__ __forceinline__ void bring(int which, const T* from) const {
    if constexpr (kHeld) {
      MTFAST_NO_UNROLL
      for (int c = static_cast<int>(threadIdx.x); c < tile && from != nullptr;
           c += static_cast<int>(blockDim.x)) {
        T value;
        round_to(value, 0.0f);
        if (c < in.layer.hidden) value = from[c];
        shared[which * tile + c] = value;
      }
    }
  }
  __device__ __forceinline__ void get(float (&to)[8], int which, const T* from, int column) const {
    if (kHeld)
      unpack(to, load8(shared + which * tile, column, tile, true));
    else
      unpack(to, load8(from, column, in.layer.hidden, false));
  }
};

// What is kept of a thread's rows and columns: all, or what the seed says.
struct Draws {
  Philox4 of[kRows] = {};
  uint32_t threshold;  // in the upper half

  __device__ __forceinline__ explicit Draws(const Layer& layer) : threshold(layer.threshold << 16) {}

  __device__ __forceinline__ void make(uint64_t seed, int64_t row, int column) {
    if (threshold == 0) return;
    MTFAST_UNROLL
    for (int i = 0; i < kRows; ++i) {
      of[i] = philox(static_cast<uint32_t>(column / 8), static_cast<uint32_t>(row + i), 0,
                     static_cast<uint32_t>(Purpose::kDropoutAddLayerNorm), seed);
    }
  }
  // What is below the draw changes nothing in the comparison with a multiple of 2^16.
  __device__ __forceinline__ bool keeps(int i, int e) const {
    const uint32_t word = of[i].word[e / 2];
    return (e % 2 == 0 ? word << 16 : word) >= threshold;
  }
};

__device__ __forceinline__ uint64_t seed_of(const Layer& layer) {
  return layer.threshold != 0 ? static_cast<uint64_t>(__ldg(layer.seed)) : 0;
}

// Eight columns of rows row .. row + kRows - 1, as they lie in memory; those from `end` on read 0.
template <class T, bool kHeld>
__device__ __forceinline__ void load_rows(Eight<T> (&to)[kRows], const Layer& layer, const T* from,
                                          int64_t row, int64_t end, int column) {
  const int hidden = static_cast<int>(layer.hidden);
  MTFAST_UNROLL
  for (int i = 0; i < kRows; ++i) {
    to[i] = load8(from + (row + i) * hidden, row + i < end ? column : hidden, hidden, kHeld);
  }
}

// s of these rows and columns. The product with `scale` is rounded, so that both directions see the same s.
template <class T, bool kHeld>
__device__ __forceinline__ void make_sums(Eights& s, Draws& draws, const Operands<T>& in,
                                          const Vectors<T, kHeld>& vectors, int x_bias_at, uint64_t seed,
                                          int64_t row, int64_t end, int column) {
  const float scale = static_cast<float>(in.layer.scale);
  Eight<T> x[kRows], residual[kRows];
  load_rows<T, kHeld>(x, in.layer, in.x, row, end, column);
  if (in.residual != nullptr) load_rows<T, kHeld>(residual, in.layer, in.residual, row, end, column);
  draws.make(seed, row, column);
  float x_bias[8] = {};
  if (in.x_bias != nullptr) vectors.get(x_bias, x_bias_at, in.x_bias, column);
  MTFAST_UNROLL
  for (int i = 0; i < kRows; ++i) {
    float of_residual[8] = {};
    unpack(s.of[i], x[i]);
    if (in.residual != nullptr) unpack(of_residual, residual[i]);
    MTFAST_UNROLL
    for (int e = 0; e < 8; ++e) {
      const float scaled = __fmul_rn(s.of[i][e] + x_bias[e], scale);
      s.of[i][e] = (draws.keeps(i, e) ? scaled : 0.0f) + of_residual[e];
    }
  }
}

// ---- launches ----

// How a block's threads lie: warps beside each other in a row, and rows below each other.
struct Block {
  bool held;
  int warps, groups;

  Block(const Inputs& in, bool aligned) {
    const int64_t hidden = in.layer.hidden;
    held = aligned && hidden <= kHeldColumns && hidden % 8 == 0 && on_16_bytes(in.x) &&
           on_16_bytes(in.residual) && on_16_bytes(in.weight) && on_16_bytes(in.bias) &&
           on_16_bytes(in.x_bias);
    warps = static_cast<int>(hidden <= kHeldColumns ? (hidden + 255) / 256 : kMostWarps);
    groups = !held ? 1 : warps <= 2 ? 8 : warps <= 4 ? 4 : warps <= 8 ? 2 : 1;
  }

  int threads() const { return 32 * warps * groups; }
  // Of `vectors` in the dtype, then of two sums a row of each warp, twice.
  size_t shared_bytes(size_t element, int vectors) const {
    return (held ? vectors * 256 * warps * element : 0) + 2 * warps * groups * 2 * kRows * sizeof(float);
  }
};

template <class T>
Operands<T> operands_of(const Inputs& in, const Block& block) {
  return {in.layer,
          static_cast<const T*>(in.x),
          static_cast<const T*>(in.residual),
          static_cast<const T*>(in.weight),
          static_cast<const T*>(in.bias),
          static_cast<const T*>(in.x_bias),
          chunk_rows(in.layer.rows),
          block.warps};
}

}  // namespace mtfast::dropout_add_layer_norm
