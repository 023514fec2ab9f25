// What a task of packed attention on the CPU is made of: rows moved to and from scratch, products of small
// matrices, dropout draws. C is float or double, the type of scratch and arithmetic.
#pragma once
#include "packed_attention.h"
#include "simd_isa.h"

namespace mtfast::attention {

using namespace simd;

template <class C>
using Vec = typename Compute<C>::vec;
template <class C>
using Mask = typename Compute<C>::mask;

MTFAST_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// ---- tasks ----

constexpr double kLog2E = 1.4426950408889634, kLn2 = 1 / kLog2E;

// Hands out aligned pieces of one buffer; with a null buffer it only measures.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class X>
  X* take(int64_t count) {
    X* p = reinterpret_cast<X*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(X)) + 63) / 64 * 64;
    return p;
  }
};

// A sequence's place, and lengths rounded up to what loops over lanes and tiles want.
struct Extent {
  int64_t begin, length, lanes, tiles;

  Extent(const AttentionShape& shape, int64_t sequence)
      : begin(shape.cu_seqlens[sequence]),
        length(shape.cu_seqlens[sequence + 1] - begin),
        lanes((length + kLanes - 1) / kLanes * kLanes),
        tiles((length + 3) / 4 * 4) {}
};

// The two of a row's statistics, as the forward leaves them.
template <class C>
MTFAST_INLINE C* statistics_of(void* stats, int64_t number) {
  return static_cast<C*>(stats) + 2 * number;
}

// What weights that are kept are multiplied by.
template <class C>
MTFAST_INLINE C keep_scale(const AttentionShape& shape) {
  return static_cast<C>(65536.0 / (65536.0 - shape.threshold));
}

// ---- rows ----

template <class T>
MTFAST_INLINE T* row_of(const AttentionTensor& x, int64_t row, int64_t head) {
  return static_cast<T*>(x.data) + row * x.row_stride + head * x.head_stride;
}

// to [padded, D] = factor * x[first : first + rows, head], then zeros.
template <class T, class C>
MTFAST_INLINE void gather(C* to, const AttentionTensor& x, int64_t first, int64_t rows, int64_t padded,
                          int64_t head, int64_t D, C factor) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* from = row_of<const T>(x, first + i, head);
    for (int64_t d = 0; d < D; d += kLanes) pack(to + i * D + d, unpack(from + d) * factor);
  }
  for (int64_t i = rows * D; i < padded * D; i += kLanes) pack(to + i, Vec<C>{});
}

template <class T, class C>
MTFAST_INLINE void scatter(const AttentionTensor& x, const C* from, int64_t first, int64_t rows, int64_t head,
                           int64_t D, C factor) {
  for (int64_t i = 0; i < rows; ++i) {
    T* to = row_of<T>(x, first + i, head);
    for (int64_t d = 0; d < D; d += kLanes) pack(to + d, unpack(from + i * D + d) * factor);
  }
}

// to [D, ld] = from [rows, D] transposed; rows a multiple of the lanes.
MTFAST_INLINE void transpose(double* to, int64_t ld, const double* from, int64_t rows, int64_t D) {
  for (int64_t d = 0; d < D; ++d)
    for (int64_t r = 0; r < rows; ++r) to[d * ld + r] = from[r * D + d];
}
MTFAST_INLINE void transpose(float* to, int64_t ld, const float* from, int64_t rows, int64_t D) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t d = 0; d < D; d += kLanes) {
      f32x16 x[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) x[i] = unpack(from + (r + i) * D + d);
      transpose16(x);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) pack(to + (d + i) * ld + r, x[i]);
    }
}

// ---- products: broadcast an element of a, multiply a row of b ----

// c [kRows, kVectors vectors] (+)= a b. a is [kRows, K] or, transposed, [K, kRows].
template <class C, int kRows, int kVectors, bool kTransposed>
MTFAST_INLINE void tile(const C* a, int64_t lda, const C* b, int64_t ldb, C* c, int64_t ldc, int64_t K,
                        bool accumulate) {
  Vec<C> sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) sums[m][n] = Vec<C>{};
  for (int64_t k = 0; k < K; ++k) {
    Vec<C> row[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) row[n] = unpack(b + k * ldb + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Vec<C> x = (kTransposed ? a[k * lda + m] : a[m * lda + k]) - Vec<C>{};
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sums[m][n] += x * row[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      C* to = c + m * ldc + n * kLanes;
      pack(to, accumulate ? unpack(to) + sums[m][n] : sums[m][n]);
    }
}

template <class C, int kTallest, int kVectors, bool kTransposed>
MTFAST_INLINE void column_of_tiles(int64_t M, const C* a, int64_t lda, const C* b, int64_t ldb, C* c,
                                   int64_t ldc, int64_t K, bool accumulate) {
  const int64_t step = kTransposed ? 1 : lda;
  int64_t m = 0;
  for (; m + kTallest <= M; m += kTallest)
    tile<C, kTallest, kVectors, kTransposed>(a + m * step, lda, b, ldb, c + m * ldc, ldc, K, accumulate);
  for (; m < M; m += 4)
    tile<C, 4, kVectors, kTransposed>(a + m * step, lda, b, ldb, c + m * ldc, ldc, K, accumulate);
}

constexpr int64_t kSummed = 128;

// c [M, N] (+)= a [M, K] b [K, N]; M a multiple of 4, N of the lanes.
template <class C, bool kTransposed>
struct Product {
  template <Isa isa>
  MTFAST_INLINE void run(int64_t M, int64_t N, int64_t K, const C* a, int64_t lda, const C* b, int64_t ldb,
                         C* c, int64_t ldc, bool accumulate) {
    // As many sums as there are registers for: 32 of 16 floats, 16 of 8, and so on.
    constexpr bool kMany = isa == Isa::kAvx512 && sizeof(C) == 4;
    for (int64_t k = 0; k < K || k == 0; k += kSummed) {  // sums of sums: long ones would round at every step
      const int64_t depth = K - k < kSummed ? K - k : kSummed;
      const C *ak = a + k * (kTransposed ? lda : 1), *bk = b + k * ldb;
      const bool add = accumulate || k > 0;
      int64_t n = 0;
      if constexpr (kMany) {
        for (; n + 4 * kLanes <= N; n += 4 * kLanes)
          column_of_tiles<C, 4, 4, kTransposed>(M, ak, lda, bk + n, ldb, c + n, ldc, depth, add);
        if (n + 3 * kLanes <= N) {
          column_of_tiles<C, 8, 3, kTransposed>(M, ak, lda, bk + n, ldb, c + n, ldc, depth, add);
          n += 3 * kLanes;
        }
        if (n + 2 * kLanes <= N) {
          column_of_tiles<C, 8, 2, kTransposed>(M, ak, lda, bk + n, ldb, c + n, ldc, depth, add);
          n += 2 * kLanes;
        }
      }
      for (; n < N; n += kLanes)
        column_of_tiles<C, kMany ? 8 : 4, 1, kTransposed>(M, ak, lda, bk + n, ldb, c + n, ldc, depth, add);
    }
  }
};

template <Isa isa, bool kTransposed = false, class C>
MTFAST_INLINE void multiply(int64_t M, int64_t N, int64_t K, const C* a, int64_t lda, const C* b, int64_t ldb,
                            C* c, int64_t ldc, bool accumulate = false) {
  On<isa>::call(Product<C, kTransposed>{}, M, N, K, a, lda, b, ldb, c, ldc, accumulate);
}

// ---- dropout ----

// Draws of rows [row, row + rows) of the sequence at `begin`, `row` a multiple of 16, and of columns
// [0, columns): that of (row + i, j) is draws[i * result + j]. The four calls of a row and sixteen columns
// lie in neighbouring lanes, so that each of their words is eight columns of one row. Fills whole groups of
// 16 by 16, but no rows that do not exist, of 8 in a strip.
template <Isa isa>
MTFAST_INLINE int64_t draw(uint16_t* draws, uint64_t seed, int64_t head, int64_t begin, int64_t row,
                           int64_t rows, int64_t columns) {
  const int64_t pitch = round_up(columns, 16);
  int64_t at = 0, column = 0;  // of the next four calls: the upper of their two rows, and the first column
  while (at < rows) {
    alignas(64) uint32_t row_of_call[kLanes], pair_of_call[kLanes];
    uint16_t* to[4];
    bool lower[4];
    int quads = 0;
    for (int quad = 0; quad < 4; ++quad) {
      for (int t = 0; t < 4; ++t) {
        row_of_call[4 * quad + t] = static_cast<uint32_t>(begin + row + at);
        pair_of_call[4 * quad + t] = static_cast<uint32_t>(column / 4 + t);
      }
      to[quad] = draws + at * pitch + column;
      lower[quad] = at + 8 < rows;
      quads += at < rows;
      column += 16;
      if (column == pitch) {
        column = 0;
        at += at % 8 == 7 ? 9 : 1;
      }
    }
    u32x16 c0, c1, words[4];
    std::memcpy(&c0, row_of_call, sizeof c0);
    std::memcpy(&c1, pair_of_call, sizeof c1);
    philox16<isa>(seed, c0, c1, static_cast<uint32_t>(head), Purpose::kAttentionDropout, words);
    const char* quad_of[4];
    for (int w = 0; w < 4; ++w) quad_of[w] = reinterpret_cast<const char*>(words + w);
    for (int quad = 0; quad < quads; ++quad) {
      std::memcpy(to[quad], quad_of[0] + 16 * quad, 16);
      std::memcpy(to[quad] + 8, quad_of[2] + 16 * quad, 16);
      if (!lower[quad]) continue;
      std::memcpy(to[quad] + 8 * pitch, quad_of[1] + 16 * quad, 16);
      std::memcpy(to[quad] + 8 * pitch + 8, quad_of[3] + 16 * quad, 16);
    }
  }
  return pitch;
}

// Of sixteen 16-bit draws: `scale` where kept, 0 where the draw is below the threshold; without dropout there
// are no draws.
template <class V, class Mask>
MTFAST_INLINE V keep_factor(const uint16_t* draws, uint32_t threshold, V scale) {
  if (threshold == 0) return scale;
  u16x16 draw;
  std::memcpy(&draw, draws, sizeof draw);
  return __builtin_convertvector(draw, Mask) >= static_cast<int>(threshold) ? scale : V{};
}

}  // namespace mtfast::attention
