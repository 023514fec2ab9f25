// Tensor-core fragments of packed attention. A 16 by 16 fragment is spread over a warp as mma's accumulators
// are: lane = 4 * g + t holds x[n][j] at row g + 8 * (j / 2), column 8 * n + 2 * t + j % 2.
#pragma once
#include "packed_attention.cuh"

namespace mtfast::attention {

using Frag = uint32_t[4];  // 16 by 16 elements of 16 bits, as a left factor
using Scores = float[2][4];
template <int kDim>
using RowFrags = Frag[kDim / 16];  // 16 rows, as a left factor
template <int kDim>
using Accumulators = float[kDim / 8][4];

// Calls f(n, j) for each element x[n][j] of a fragment that a lane holds.
template <class F>
__device__ __forceinline__ void for_each_held(F f) {
  MTFAST_UNROLL
  for (int n = 0; n < 2; ++n) {
    MTFAST_UNROLL
    for (int j = 0; j < 4; ++j) f(n, j);
  }
}

// Rows of 16-bit elements in shared memory; their chunks of 16 bytes are swizzled so that ldmatrix meets no
// bank twice.
template <class T, int kColumns>
struct Tile {
  static constexpr int kChunks = kColumns / 8, kRowBytes = kColumns * 2;

  unsigned char* data;

  __device__ __forceinline__ explicit Tile(unsigned char* memory) : data(memory) {}

  // Chunk c of row i among rows that begin at a multiple of 8. A lane's own is best made once: that of chunk
  // c ^ d is its offset ^ 16 * d.
  __device__ __forceinline__ static unsigned offset(int i, int c) {
    return static_cast<unsigned>(i * kRowBytes) ^
           static_cast<unsigned>((c ^ (kChunks >= 8 ? i & 7 : i >> 1 & 3)) * 16);
  }
  __device__ __forceinline__ unsigned char* at(int row, unsigned offset) const {
    return data + row * kRowBytes + offset;
  }
};

// Rows [0, rows) of `to`, a multiple of 16, in the background by kThreads threads: from `first` on of one
// head, or zeros where there are no more than `count`.
template <int kThreads, class T, int kDim>
__device__ __forceinline__ void copy_rows(const Tile<T, kDim>& to, const HeadRows<T>& from, int first,
                                          int rows, int count) {
  constexpr int kChunks = Tile<T, kDim>::kChunks, kStep = kThreads / kChunks;
  constexpr int kEach = kStep < 16 ? 16 / kStep : 1;  // copies of a thread to 16 rows
  const int c = static_cast<int>(threadIdx.x) % kChunks, row0 = static_cast<int>(threadIdx.x) / kChunks;
  const T* source = from.row(first + row0) + c * 8;
  MTFAST_NO_UNROLL
  for (int base = 0; base < rows; base += kStep * kEach) {
    MTFAST_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const int row = base + row0 + i * kStep;
      if (kStep <= 16 || row < rows) {
        ptx::cp_async_16(to.at(base, Tile<T, kDim>::offset(row0 + i * kStep, c)), source,
                         row < count ? 16 : 0);
      }
      source += kStep * from.stride;
    }
  }
}

// ---- left factors ----

template <class T, int kDim>
__device__ __forceinline__ void read_frags(RowFrags<kDim>& a, const Tile<T, kDim>& tile, int row) {
  const unsigned offset = Tile<T, kDim>::offset(lane_index() & 15, lane_index() >> 4);
  MTFAST_UNROLL
  for (int k = 0; k < kDim / 16; ++k) ptx::ldmatrix_x4(a[k], tile.at(row, offset ^ 32 * k));
}

// From global memory: row `first` and those behind it, zeros from `count` on.
template <class T, int kDim>
__device__ __forceinline__ void read_frags(RowFrags<kDim>& a, const HeadRows<T>& from, int first, int count) {
  const int g = lane_index() >> 2, t = lane_index() & 3;
  MTFAST_UNROLL
  for (int r = 0; r < 2; ++r) {
    const bool pred = g + 8 * r < count;
    const T* row = from.row(first + g + 8 * r) + 2 * t;
    MTFAST_UNROLL
    for (int k = 0; k < kDim / 16; ++k) {
      MTFAST_UNROLL
      for (int half = 0; half < 2; ++half) {
        a[k][2 * half + r] = pred ? *reinterpret_cast<const uint32_t*>(row + 16 * k + 8 * half) : 0;
      }
    }
  }
}

// 16 rows and columns of `tile`, transposed.
template <class T, int kColumns>
__device__ __forceinline__ void read_transposed(Frag& a, const Tile<T, kColumns>& tile, int row, int column) {
  const int lane = lane_index();
  const unsigned offset = Tile<T, kColumns>::offset((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
  ptx::ldmatrix_x4_trans(a, tile.at(row, offset ^ 2 * column));
}

// Of two neighbouring fragments of accumulators.
template <class T>
__device__ __forceinline__ void to_frag(Frag& a, const float (&left)[4], const float (&right)[4]) {
  a[0] = pair_bits<T>(left[0], left[1]);
  a[1] = pair_bits<T>(left[2], left[3]);
  a[2] = pair_bits<T>(right[0], right[1]);
  a[3] = pair_bits<T>(right[2], right[3]);
}

// To 16 rows and columns of `tile`.
template <class T, int kColumns>
__device__ __forceinline__ void write_frag(const Tile<T, kColumns>& tile, int row, int column,
                                           const Frag& a) {
  const unsigned offset = Tile<T, kColumns>::offset(lane_index() >> 2, 0) + (lane_index() & 3) * 4;
  MTFAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    unsigned char* to = tile.at(row + i % 2 * 8, offset ^ (2 * column + i / 2 * 16));
    *reinterpret_cast<uint32_t*>(to) = a[i];
  }
}

// ---- products ----

// x = a b^T with 16 rows of `b`
template <class T, int kDim>
__device__ __forceinline__ void multiply(Scores& x, const RowFrags<kDim>& a, const Tile<T, kDim>& b,
                                         int row) {
  const int lane = lane_index();
  const unsigned offset = Tile<T, kDim>::offset((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
  for_each_held([&](int n, int j) { x[n][j] = 0.0f; });
  MTFAST_UNROLL
  for (int k = 0; k < kDim / 16; ++k) {
    Frag rows;
    ptx::ldmatrix_x4(rows, b.at(row, offset ^ 32 * k));
    mma<T>(x[0], a[k], rows[0], rows[1]);
    mma<T>(x[1], a[k], rows[2], rows[3]);
  }
}

// out += a b with 16 rows of `b`
template <class T, int kDim>
__device__ __forceinline__ void add_product(Accumulators<kDim>& out, const Frag& a, const Tile<T, kDim>& b,
                                            int row) {
  const unsigned offset = Tile<T, kDim>::offset(lane_index() & 15, lane_index() >> 4);
  MTFAST_UNROLL
  for (int n = 0; n < kDim / 8; n += 2) {
    Frag columns;
    ptx::ldmatrix_x4_trans(columns, b.at(row, offset ^ 16 * n));
    mma<T>(out[n], a, columns[0], columns[1]);
    mma<T>(out[n + 1], a, columns[2], columns[3]);
  }
}

// The sums of products of rows g and g + 8 of two matrices, in all lanes of their quad. In the order in which
// `multiply` sums: a row of `b` that is one of its right factor's gives the same bits.
template <class T, int kDim>
__device__ __forceinline__ void row_dots(float (&to)[2], const RowFrags<kDim>& a, const RowFrags<kDim>& b) {
  Scores x = {};
  MTFAST_UNROLL
  for (int k = 0; k < kDim / 16; ++k) {
    mma<T>(x[0], a[k], b[k][0], b[k][2]);
    mma<T>(x[1], a[k], b[k][1], b[k][3]);
  }
  const int lane = lane_index(), g = lane >> 2;
  MTFAST_UNROLL
  for (int r = 0; r < 2; ++r) {  // the diagonal
    to[r] = __shfl_sync(kAllLanes, g & 1 ? x[r][2 * r + 1] : x[r][2 * r], (lane & ~3) | g >> 1);
  }
}

// ---- results ----

template <int kDim>
__device__ __forceinline__ void scale_rows(Accumulators<kDim>& x, const float (&factor)[2]) {
  MTFAST_UNROLL
  for (int n = 0; n < kDim / 8; ++n) {
    MTFAST_UNROLL
    for (int j = 0; j < 4; ++j) x[n][j] *= factor[j >> 1];
  }
}

// The first `count` rows, scaled and rounded, to row `first` and those behind it, whole lines at a time by
// way of 16 rows of shared memory.
template <class T, int kDim>
__device__ __forceinline__ void store_rows(const HeadRows<T>& to, int first, int count, Accumulators<kDim>& x,
                                           const float (&factor)[2], const Tile<T, kDim>& scratch) {
  constexpr int kChunks = Tile<T, kDim>::kChunks, kStep = 32 / kChunks;
  const int c = lane_index() % kChunks, row0 = lane_index() / kChunks;
  scale_rows<kDim>(x, factor);
  MTFAST_UNROLL
  for (int k = 0; k < kDim / 16; ++k) {
    Frag rounded;
    to_frag<T>(rounded, x[2 * k], x[2 * k + 1]);
    write_frag(scratch, 0, 16 * k, rounded);
  }
  __syncwarp();
  T* target = to.row(first + row0) + c * 8;
  MTFAST_UNROLL
  for (int i = 0; i < 16 / kStep; ++i) {
    const int row = row0 + i * kStep;
    const T* from = reinterpret_cast<const T*>(scratch.at(0, Tile<T, kDim>::offset(row, c)));
    if (row < count) store(target, load(from));
    target += kStep * to.stride;
  }
  __syncwarp();
}

}  // namespace mtfast::attention
