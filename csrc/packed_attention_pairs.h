// Matrices of bfloat16 for the dot product instruction of AVX-512 BF16, which takes two neighbours along the
// sum at a time: products, and rows of tensors to pairs and back.
#pragma once
#include "packed_attention_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12's own header

#define MTFAST_BF16_INLINE MTFAST_BF16 MTFAST_INLINE

namespace mtfast::attention {

// ---- products ----

// c [rows, columns] (+)= a b, float. A pair of neighbours along the sum is four bytes: pair k of row m of a
// is at a + m * a_row + k * a_pair; b is [pairs, b_columns] of pairs.
struct PairProduct {
  const bf16* a = nullptr;
  int64_t a_row = 0, a_pair = 0;
  const bf16* b = nullptr;
  int64_t b_columns = 0, pairs = 0;
  float* c = nullptr;
  int64_t c_row = 0;
  bool accumulate = false;
};

template <int kRows, int kVectors>
MTFAST_BF16 void tile(const PairProduct& p, int64_t row, int64_t column) {
  const bf16 *a = p.a + row * p.a_row, *b = p.b + 2 * column;
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) sums[m][n] = _mm512_setzero_ps();
  for (int64_t k = 0; k < p.pairs; ++k) {
    __m512i right[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) right[n] = _mm512_loadu_si512(b + 2 * n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      int32_t pair;
      std::memcpy(&pair, a + m * p.a_row, sizeof pair);
      const __m512i left = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n)
        sums[m][n] = _mm512_dpbf16_ps(sums[m][n], (__m512bh)left, (__m512bh)right[n]);
    }
    a += p.a_pair;
    b += 2 * p.b_columns;
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      float* to = p.c + (row + m) * p.c_row + column + n * kLanes;
      _mm512_storeu_ps(to, p.accumulate ? _mm512_add_ps(_mm512_loadu_ps(to), sums[m][n]) : sums[m][n]);
    }
}

template <int kVectors>
void multiply_columns(const PairProduct& p, int64_t rows, int64_t column) {
  constexpr int kRows = kVectors == 4 ? 6 : 8;  // as many sums as there are registers for
  constexpr decltype(&tile<1, kVectors>) kLast[8] = {nullptr,           tile<1, kVectors>, tile<2, kVectors>,
                                                     tile<3, kVectors>, tile<4, kVectors>, tile<5, kVectors>,
                                                     tile<6, kVectors>, tile<7, kVectors>};
  const int64_t last = rows % kRows;
  for (int64_t row = 0; row < rows - last; row += kRows) tile<kRows, kVectors>(p, row, column);
  if (last > 0) kLast[last](p, rows - last, column);
}

// columns: a multiple of 16.
inline void multiply(const PairProduct& p, int64_t rows, int64_t columns) {
  int64_t column = 0;
  for (; column + 64 <= columns; column += 64) multiply_columns<4>(p, rows, column);
  for (; column + 32 <= columns; column += 32) multiply_columns<2>(p, rows, column);
  if (column < columns) multiply_columns<1>(p, rows, column);
}

// ---- operands and results ----

// The order in which sixteen elements from `even` on and sixteen from `odd` on make pairs.
MTFAST_BF16_INLINE __m512i pairing(int even, int odd) {
  alignas(64) uint16_t place[2 * kLanes];
  for (int i = 0; i < kLanes; ++i) {
    place[2 * i] = static_cast<uint16_t>(even + i);
    place[2 * i + 1] = static_cast<uint16_t>(odd + i);
  }
  return _mm512_load_si512(place);
}

// to [rows / 2 rounded up, D] of pairs = rows `first` .. `first + rows` of x, two rows' neighbours a pair; a
// row that is missing at the end is zeros.
MTFAST_BF16 inline void pair_rows(bf16* to, const AttentionTensor& x, int64_t first, int64_t rows,
                                  int64_t head, int64_t D) {
  const __m512i low = pairing(0, 32), high = pairing(16, 48);
  for (int64_t i = 0; i < rows; i += 2) {
    const bf16 *even = row_of<const bf16>(x, first + i, head), *odd = even + x.row_stride;
    const bool both = i + 1 < rows;
    for (int64_t d = 0; d < D; d += 32, to += 64) {
      const __m512i upper = _mm512_loadu_si512(even + d);
      const __m512i lower = both ? _mm512_loadu_si512(odd + d) : _mm512_setzero_si512();
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(upper, low, lower));
      _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(upper, high, lower));
    }
  }
}

// to [D / 2, 16] of pairs = up to sixteen rows of x, transposed, neighbours in a row a pair; rows that are
// missing are zeros.
MTFAST_BF16 inline void transpose_pairs(bf16* to, const AttentionTensor& x, int64_t first, int64_t rows,
                                        int64_t head, int64_t D) {
  for (int64_t d = 0; d < D; d += 2 * kLanes) {
    f32x16 lanes[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      lanes[i] = i < rows ? unpack(reinterpret_cast<const float*>(row_of<const bf16>(x, first + i, head) + d))
                          : f32x16{};
    transpose16(lanes);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) pack(reinterpret_cast<float*>(to + (d / 2 + i) * 2 * kLanes), lanes[i]);
  }
}

// Rows `first` .. `first + rows` of x = from [rows, D], row i times factors[i * step].
MTFAST_BF16 inline void write_rows(const AttentionTensor& x, const float* from, int64_t first, int64_t rows,
                                   int64_t head, int64_t D, const float* factors, int64_t step) {
  for (int64_t i = 0; i < rows; ++i) {
    bf16* to = row_of<bf16>(x, first + i, head);
    const __m512 factor = _mm512_set1_ps(factors[i * step]);
    for (int64_t d = 0; d < D; d += 2 * kLanes, from += 2 * kLanes) {
      const __m512 left = _mm512_mul_ps(_mm512_loadu_ps(from), factor);
      const __m512 right = _mm512_mul_ps(_mm512_loadu_ps(from + kLanes), factor);
      _mm512_storeu_si512(to + d, (__m512i)_mm512_cvtne2ps_pbh(right, left));
    }
  }
}

}  // namespace mtfast::attention
#endif
