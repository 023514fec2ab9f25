// Tiles of packed attention in shared memory, and the products of their 16 by 16 pieces.
#pragma once
#include "device/element.cuh"
#include "packed_attention.h"
#include "packed_attention_plan.cuh"

// A loop that unrolled whole would hold more than the registers can.
#if defined(__CUDACC__)
#define MTFAST_UNROLL_2 _Pragma("unroll 2")
#define MTFAST_NO_UNROLL _Pragma("unroll 1")
#else
#define MTFAST_UNROLL_2
#define MTFAST_NO_UNROLL
#endif

namespace mtfast::attention {

// ---- tiles ----

// Rows of kDim elements in shared memory; 16-byte chunks of 16-bit tiles are swizzled so that ldmatrix meets
// no bank conflict, float rows are padded.
template <class T, int kDim>
struct Tile {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kPerChunk = 16 / sizeof(T), kChunks = kDim / kPerChunk;
  static constexpr int kRow = kWide ? kDim + 4 : kDim;
  static constexpr int kPiece = attention_piece(kWide ? Dtype::kFloat32 : Dtype::kBFloat16, kDim);
  static constexpr int kMaxRows = kWide || kDim == 128 ? kPiece : 96;
  static constexpr int kElements = kMaxRows * kRow;

  T* data;

  __device__ __forceinline__ T* chunk(int row, int c) const {
    const int swizzled = kWide ? c : c ^ (kChunks >= 8 ? row & 7 : (row >> 1) & 3);
    return data + row * kRow + swizzled * kPerChunk;
  }
  __device__ __forceinline__ T* at(int row, int column) const {
    if constexpr (kWide) return data + row * kRow + column;
    return chunk(row, column / kPerChunk) + column % kPerChunk;
  }
};

template <class T>
__device__ __forceinline__ T* head_of(const AttentionTensor& x, int head) {
  return static_cast<T*>(x.data) + head * x.head_stride;
}

// Where a tile's rows come from: one head of a tensor.
template <class T, int kDim>
struct Source {
  Tile<T, kDim> tile;
  const T* x;
  int64_t row_stride;

  __device__ __forceinline__ Source(const Tile<T, kDim>& tile, const AttentionTensor& from, int head)
      : tile(tile), x(head_of<const T>(from, head)), row_stride(from.row_stride) {}

  // 16 bytes in the background, or zeros
  __device__ __forceinline__ void copy(int row, int chunk, int64_t from, bool inside) const {
    ptx::cp_async_16(tile.chunk(row, chunk),
                     inside ? x + from * row_stride + chunk * Tile<T, kDim>::kPerChunk : x, inside ? 16 : 0);
  }
};

// The strips' rows of each source; rows past a sequence's end become 0.
template <class T, int kDim, int kCount>
__device__ __forceinline__ void load_strips(const Source<T, kDim> (&sources)[kCount], const Plan& plan) {
  constexpr int kChunks = Tile<T, kDim>::kChunks;
  for (int i = threadIdx.x; i < plan.strips * 16 * kChunks; i += kThreads) {
    const int row = i / kChunks, c = i % kChunks;
    const Strip& strip = plan.strip[row / 16];
    const int place = strip.offset + row % 16;
    MTFAST_UNROLL
    for (int s = 0; s < kCount; ++s) sources[s].copy(row, c, strip.begin + place, place < strip.length);
  }
}

// A piece of one sequence, from `offset` on.
template <class T, int kDim, int kCount>
__device__ __forceinline__ void load_piece(const Source<T, kDim> (&sources)[kCount], const Strip& of,
                                           int offset) {
  constexpr int kChunks = Tile<T, kDim>::kChunks;
  for (int i = threadIdx.x; i < Tile<T, kDim>::kPiece * kChunks; i += kThreads) {
    const int row = i / kChunks, c = i % kChunks, place = offset + row;
    MTFAST_UNROLL
    for (int s = 0; s < kCount; ++s) sources[s].copy(row, c, of.begin + place, place < of.length);
  }
}

__device__ __forceinline__ void wait_for_loads() {
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
}

// ---- products ----
//
// A 16 by 16 piece is spread over a warp as mma's accumulators are: lane = 4 * g + t holds x[n][j] at row
// g + 8 * (j / 2), column 8 * n + 2 * t + j % 2.

using Piece16 = float[2][4];

// A piece's diagonal, for rows g and g + 8 in all lanes of their quad.
__device__ __forceinline__ void diagonal(float (&to)[2], const Piece16& x) {
  const int lane = lane_index(), g = lane >> 2;
  MTFAST_UNROLL
  for (int r = 0; r < 2; ++r)
    to[r] = __shfl_sync(kAllLanes, g & 1 ? x[r][2 * r + 1] : x[r][2 * r], (lane & ~3) | g >> 1);
}

// 16 rows of a tile as the left factor of x = a b^T, kept in registers or read at each use.
template <class T, int kDim, bool kKept = kDim <= 64>
struct Rows16 {
  const Tile<T, kDim>& tile;
  int row;
  uint32_t a[kKept ? kDim / 16 : 1][4];

  __device__ __forceinline__ Rows16(const Tile<T, kDim>& tile, int row) : tile(tile), row(row) {
    if constexpr (kKept) {
      MTFAST_UNROLL
      for (int k = 0; k < kDim / 16; ++k) read(a[k], k);
    }
  }
  __device__ __forceinline__ void read(uint32_t (&to)[4], int k) const {
    const int lane = lane_index();
    ptx::ldmatrix_x4(to, tile.chunk(row + (lane & 15), 2 * k + (lane >> 4)));
  }
  // x = these rows times 16 rows of `other`, transposed
  __device__ __forceinline__ void times(Piece16& x, const Tile<T, kDim>& other, int other_row) {
    MTFAST_UNROLL
    for (int n = 0; n < 2; ++n) MTFAST_UNROLL
    for (int j = 0; j < 4; ++j) x[n][j] = 0.0f;
    if constexpr (kKept) {
      MTFAST_UNROLL
      for (int k = 0; k < kDim / 16; ++k) step(x, a[k], other, other_row, k);
    } else {
      MTFAST_UNROLL_2
      for (int k = 0; k < kDim / 16; ++k) {
        read(a[0], k);
        step(x, a[0], other, other_row, k);
      }
    }
  }
  __device__ __forceinline__ static void step(Piece16& x, const uint32_t (&a)[4], const Tile<T, kDim>& other,
                                              int other_row, int k) {
    const int lane = lane_index();
    uint32_t b[4];
    ptx::ldmatrix_x4(b, other.chunk(other_row + (lane & 7) + (lane >> 4) * 8, 2 * k + ((lane >> 3) & 1)));
    mma<T>(x[0], a, b[0], b[1]);
    mma<T>(x[1], a, b[2], b[3]);
  }
};

template <int kDim, bool kKept>
struct Rows16<float, kDim, kKept> {
  const Tile<float, kDim>& tile;
  int row;
  __device__ __forceinline__ Rows16(const Tile<float, kDim>& tile, int row) : tile(tile), row(row) {}
  __device__ __forceinline__ void times(Piece16& x, const Tile<float, kDim>& other, int other_row) {
    const int g = lane_index() >> 2, t = lane_index() & 3;
    MTFAST_UNROLL
    for (int n = 0; n < 2; ++n) MTFAST_UNROLL
    for (int j = 0; j < 4; ++j) x[n][j] = 0.0f;
    MTFAST_NO_UNROLL
    for (int from = 0; from < kDim; from += 16) {  // sums of sums, since a long one loses bits
      Piece16 part = {};
      MTFAST_NO_UNROLL
      for (int d = from; d < from + 16; ++d) {
        const float a[2] = {*tile.at(row + g, d), *tile.at(row + g + 8, d)};
        MTFAST_UNROLL
        for (int n = 0; n < 2; ++n) MTFAST_UNROLL
        for (int e = 0; e < 2; ++e) {
          const float b = *other.at(other_row + 8 * n + 2 * t + e, d);
          part[n][e] += a[0] * b;
          part[n][2 + e] += a[1] * b;
        }
      }
      MTFAST_UNROLL
      for (int n = 0; n < 2; ++n) MTFAST_UNROLL
      for (int j = 0; j < 4; ++j) x[n][j] += part[n][j];
    }
  }
};

// A strip of results: rows as in Piece16, column 8 * n + 2 * t + j % 2.
template <int kDim>
struct Result16 {
  float x[kDim / 8][4];
  __device__ __forceinline__ Result16() { scale(0.0f, 0.0f, true); }
  __device__ __forceinline__ void scale(float upper, float lower, bool clear = false) {
    MTFAST_UNROLL
    for (int n = 0; n < kDim / 8; ++n) MTFAST_UNROLL
    for (int j = 0; j < 4; ++j) x[n][j] = clear ? 0.0f : x[n][j] * (j < 2 ? upper : lower);
  }
};

constexpr int kScratchPerWarp = 16 * 17;  // floats, for the float kernels

// result += p times 16 rows of b
template <class T, int kDim>
__device__ __forceinline__ void add_product(Result16<kDim>& result, const Piece16& p, const Tile<T, kDim>& b,
                                            int b_row, float* scratch) {
  const int lane = lane_index();
  if constexpr (sizeof(T) == 2) {
    const uint32_t a[4] = {pair_bits<T>(p[0][0], p[0][1]), pair_bits<T>(p[0][2], p[0][3]),
                           pair_bits<T>(p[1][0], p[1][1]), pair_bits<T>(p[1][2], p[1][3])};
    MTFAST_UNROLL
    for (int n = 0; n < kDim / 8; n += 2) {
      uint32_t bits[4];
      ptx::ldmatrix_x4_trans(bits, b.chunk(b_row + (lane & 15), n + (lane >> 4)));
      mma<T>(result.x[n], a, bits[0], bits[1]);
      mma<T>(result.x[n + 1], a, bits[2], bits[3]);
    }
  } else {
    const int g = lane >> 2, t = lane & 3;
    __syncwarp();
    MTFAST_UNROLL
    for (int n = 0; n < 2; ++n) MTFAST_UNROLL
    for (int j = 0; j < 4; ++j) scratch[(g + 8 * (j >> 1)) * 17 + 8 * n + 2 * t + (j & 1)] = p[n][j];
    __syncwarp();
    MTFAST_UNROLL
    for (int from = 0; from < kDim / 8; from += 4) {
      float part[4][4] = {};
      MTFAST_NO_UNROLL
      for (int k = 0; k < 16; ++k) {
        const float upper = scratch[g * 17 + k], lower = scratch[(g + 8) * 17 + k];
        MTFAST_UNROLL
        for (int n = 0; n < 4; ++n) MTFAST_UNROLL
        for (int e = 0; e < 2; ++e) {
          const float value = *b.at(b_row + k, 8 * (from + n) + 2 * t + e);
          part[n][e] += upper * value;
          part[n][2 + e] += lower * value;
        }
      }
      MTFAST_UNROLL
      for (int n = 0; n < 4; ++n) MTFAST_UNROLL
      for (int j = 0; j < 4; ++j) result.x[from + n][j] += part[n][j];
    }
  }
}

// Lane t of each quad gives v[i] to lane i and gets, as v[j], what lane j held for it.
__device__ __forceinline__ void quad_transpose(uint32_t (&v)[4]) {
  const int t = lane_index() & 3;
  MTFAST_UNROLL
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, t & 1 ? v[i] : v[i + 1], 1);
    (t & 1 ? v[i] : v[i + 1]) = other;
  }
  MTFAST_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, t & 2 ? v[i] : v[i + 2], 2);
    (t & 2 ? v[i] : v[i + 2]) = other;
  }
}

// Rows of the strip that exist, times a factor each for rows g and g + 8, 16 bytes at a time.
template <class T, int kDim>
__device__ inline void store_strip(const AttentionTensor& to, int head, const Strip& strip,
                                   const Result16<kDim>& result, float upper, float lower) {
  const int g = lane_index() >> 2, t = lane_index() & 3;
  T* base = head_of<T>(to, head);
  MTFAST_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int place = strip.offset + g + 8 * r;
    const bool inside = place < strip.length;
    T* row = base + (strip.begin + (inside ? place : 0)) * to.row_stride;
    const float factor = r ? lower : upper;
    if constexpr (sizeof(T) == 2) {
      MTFAST_UNROLL
      for (int n = 0; n < kDim / 8; n += 4) {
        uint32_t v[4];
        MTFAST_UNROLL
        for (int i = 0; i < 4; ++i)
          v[i] = pair_bits<T>(result.x[n + i][2 * r] * factor, result.x[n + i][2 * r + 1] * factor);
        quad_transpose(v);
        if (inside) ptx::store_16(row + 8 * (n + t), v);
      }
    } else {
      MTFAST_UNROLL
      for (int n = 0; n < kDim / 8; ++n)
        if (inside)
          *reinterpret_cast<float2*>(row + 8 * n + 2 * t) =
              float2{result.x[n][2 * r] * factor, result.x[n][2 * r + 1] * factor};
    }
  }
}

}  // namespace mtfast::attention
