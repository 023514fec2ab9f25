// What both directions of dropout_add_layer_norm on CUDA do with rows: where a thread's columns are, the sums
// of a row over its threads, s made of what was read.
#pragma once
#include "device/eight.cuh"
#include "device/reduce.cuh"
#include "dropout_add_layer_norm.h"

namespace mtfast::dropout_add_layer_norm {

constexpr int kMostWarps = 16, kMostThreads = 32 * kMostWarps;  // beside each other in a row
// A row of at most so many columns is held, if every row begins on 16 bytes: it is in registers from its load
// to its end. Others are long.
constexpr int64_t kHeldColumns = 8 * kMostThreads;

template <class T>
struct Operands {
  Layer layer;
  const T *x, *residual, *weight, *bias, *x_bias;
  int64_t chunk_rows;  // of a block
  int warps;           // beside each other in a row

  // This block's rows.
  __device__ __forceinline__ int64_t begin() const { return blockIdx.x * chunk_rows; }
  __device__ __forceinline__ int64_t end() const {
    return begin() + chunk_rows < layer.rows ? begin() + chunk_rows : layer.rows;
  }
};

// A thread's place: its first columns in a row, and which of the rows that a block has under way is its.
struct Place {
  int warps, group, groups;
  int column, tile;  // tile: columns that the warps beside each other have

  __device__ __forceinline__ explicit Place(int warps)
      : warps(warps),
        group(static_cast<int>(threadIdx.x) / (32 * warps)),
        groups(static_cast<int>(blockDim.x) / (32 * warps)),
        column(static_cast<int>(threadIdx.x) % (32 * warps) * 8),
        tile(256 * warps) {}

  // f(column) for the thread's columns of a long row.
  template <class F>
  __device__ __forceinline__ void each_tile(int hidden, const F& f) const {
    MTFAST_NO_UNROLL
    for (int first = column; first < hidden; first += tile) f(first);
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

// Where the block has vectors of a layer whose rows are held: in shared memory, [vectors, tile], padded with
// zeros.
template <class T>
struct Vectors {
  T* shared;
  int tile;

  // `from` as number `which`; the whole block calls, and a barrier must follow.
  __device__ __forceinline__ void bring(int which, const T* from, int hidden) const {
    MTFAST_NO_UNROLL
    for (int c = static_cast<int>(threadIdx.x) * 8; c < tile; c += static_cast<int>(blockDim.x) * 8) {
      const Eight<T> eight = load8(from, c, from != nullptr ? hidden : 0, true);
      MTFAST_UNROLL
      for (int i = 0; i < 8 / Eight<T>::kSize; ++i) {
        uint4 bits;
        memcpy(&bits, eight.parts + i, sizeof bits);
        *reinterpret_cast<uint4*>(shared + which * tile + c + i * Eight<T>::kSize) = bits;
      }
    }
  }
  __device__ __forceinline__ Eight<T> at(int which, int column) const {
    return load8(shared + which * tile, column, tile, true);
  }
};

// What is kept of eight columns of a row: all, or what the seed says.
struct Draws {
  Philox4 of;
  uint32_t threshold;  // in the upper half

  __device__ __forceinline__ Draws(const Layer& layer, uint64_t seed, int64_t row, int column)
      : of{}, threshold(layer.threshold << 16) {
    if (threshold == 0) return;
    of = philox(static_cast<uint32_t>(column / 8), static_cast<uint32_t>(row), 0,
                static_cast<uint32_t>(Purpose::kDropoutAddLayerNorm), seed);
  }
  // What is below the draw changes nothing in the comparison with a multiple of 2^16.
  __device__ __forceinline__ bool keeps(int e) const {
    const uint32_t word = of.word[e / 2];
    return (e % 2 == 0 ? word << 16 : word) >= threshold;
  }
};

__device__ __forceinline__ uint64_t seed_of(const Layer& layer) {
  return layer.threshold != 0 ? static_cast<uint64_t>(__ldg(layer.seed)) : 0;
}

// Eight columns of a vector or, with its first element, of a row; zeros where it is not there.
template <class T>
__device__ __forceinline__ Eight<T> columns_of(const T* from, int column, int hidden, bool held,
                                               bool exists) {
  return load8(from, column, exists && from != nullptr ? hidden : 0, held);
}

// s of eight columns. The product with `scale` is rounded, so that both directions see the same s.
template <class T>
__device__ __forceinline__ void make_sums(float (&s)[8], const Layer& layer, const Draws& draws,
                                          const Eight<T>& x, const Eight<T>& residual,
                                          const Eight<T>& x_bias) {
  const float scale = static_cast<float>(layer.scale);
  float of_residual[8], of_bias[8];
  unpack(s, x);
  unpack(of_residual, residual);
  unpack(of_bias, x_bias);
  MTFAST_UNROLL
  for (int e = 0; e < 8; ++e) {
    const float scaled = __fmul_rn(s[e] + of_bias[e], scale);
    s[e] = (draws.keeps(e) ? scaled : 0.0f) + of_residual[e];
  }
}

// The same of a long row, read where it lies.
template <class T>
__device__ __forceinline__ void make_long_sums(float (&s)[8], const Draws& draws, const Operands<T>& in,
                                               int64_t row, int column) {
  const int hidden = static_cast<int>(in.layer.hidden);
  make_sums(s, in.layer, draws, columns_of(in.x + row * hidden, column, hidden, false, true),
            columns_of(in.residual + row * hidden, column, hidden, false, in.residual != nullptr),
            columns_of(in.x_bias, column, hidden, false, true));
}

// ---- launches ----

inline bool is_held(const Inputs& in, bool others_aligned) {
  return others_aligned && in.layer.hidden <= kHeldColumns && in.layer.hidden % 8 == 0 && on_16_bytes(in.x) &&
         on_16_bytes(in.residual) && on_16_bytes(in.weight) && on_16_bytes(in.bias) && on_16_bytes(in.x_bias);
}

// Warps beside each other in a row that is held.
inline int warps_of(const Layer& layer) { return static_cast<int>((layer.hidden + 255) / 256); }

template <class T>
Operands<T> operands_of(const Inputs& in, int64_t chunk_rows, int warps) {
  return {in.layer,
          static_cast<const T*>(in.x),
          static_cast<const T*>(in.residual),
          static_cast<const T*>(in.weight),
          static_cast<const T*>(in.bias),
          static_cast<const T*>(in.x_bias),
          chunk_rows,
          warps};
}

}  // namespace mtfast::dropout_add_layer_norm
