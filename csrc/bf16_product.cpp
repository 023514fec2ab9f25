#include "bf16_product.h"

#include "simd_isa.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12's own header

namespace mtfast::concat_mlp {
namespace {

using namespace simd;

constexpr int kPanelVectors = kPanel / kLanes;  // of sums; of pairs too: one is as wide as a float
constexpr int kTileRows = 6;  // 6 x 4 sums, 4 vectors of the panel and a pair fill the registers

MTFAST_INLINE uint32_t first_lanes(int64_t count) {
  return count >= 32 ? ~0u : count <= 0 ? 0 : (1u << count) - 1;
}

// kRows rows of the product from row `begin + row` on.
template <int kRows>
MTFAST_BF16 void multiply_tile(const PanelProduct& p, int64_t row) {
  bf16* to = p.to + row * p.to_pitch;
  __m512 sum[kRows][kPanelVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kPanelVectors; ++j)
      if (p.start != nullptr) {
        sum[i][j] = _mm512_loadu_ps(p.start + (row + i) * p.start_pitch + j * kLanes);
      } else {
        const auto mask = static_cast<__mmask16>(first_lanes(p.columns - j * kLanes));
        const __m256i there = _mm256_maskz_loadu_epi16(mask, to + i * p.to_pitch + j * kLanes);
        sum[i][j] = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(there), 16);
      }
  const Pairs* b = p.b;
  for (int part = 0; part < p.parts; ++part) {
    const bf16* a[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) a[i] = row_of(p.a[part], p.begin + row + i);
    for (int64_t k = 0; k < p.pairs; ++k, ++b) {
      __m512i column[kPanelVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kPanelVectors; ++j) column[j] = _mm512_load_si512(b->of[j * kLanes]);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        int32_t pair;
        std::memcpy(&pair, a[i] + k * p.step, sizeof pair);
        const __m512i both = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int j = 0; j < kPanelVectors; ++j)
          sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)both, (__m512bh)column[j]);
      }
    }
  }
  if (p.sums != nullptr) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kPanelVectors; ++j)
        _mm512_storeu_ps(p.sums + (row + i) * kPanel + j * kLanes, sum[i][j]);
    return;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; j += 2)
      _mm512_mask_storeu_epi16(to + i * p.to_pitch + j * kLanes, first_lanes(p.columns - j * kLanes),
                               (__m512i)_mm512_cvtne2ps_pbh(sum[i][j + 1], sum[i][j]));
}

}  // namespace

bool has_bf16_product() {
  static const bool has = has_bf16_dot() && !__builtin_cpu_supports("amx-bf16");
  return has;
}

void multiply(const PanelProduct& p) {
  constexpr decltype(&multiply_tile<1>) kLast[kTileRows] = {
      nullptr, multiply_tile<1>, multiply_tile<2>, multiply_tile<3>, multiply_tile<4>, multiply_tile<5>};
  const int64_t rows = p.end - p.begin, last = rows % kTileRows;
  for (int64_t row = 0; row < rows - last; row += kTileRows) multiply_tile<kTileRows>(p, row);
  if (last > 0) kLast[last](p, rows - last);
}

MTFAST_BF16 void pack_rows(Pairs* panel, const Source& from, int64_t begin, int64_t columns, int64_t pairs) {
  for (int j = 0; j < kPanel; j += kLanes)
    for (int64_t k = 0; k < pairs; k += kLanes) {
      f32x16 x[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        x[i] = j + i < columns
                   ? load(reinterpret_cast<const float*>(row_of(from, begin + j + i)) + k, pairs - k)
                   : f32x16{};
      transpose16(x);
      for (int i = 0; i < kLanes && k + i < pairs; ++i)
        pack(reinterpret_cast<float*>(panel[k + i].of[j]), x[i]);
    }
}

MTFAST_BF16 void interleave(Pairs* panels, const Source& from, int64_t begin, int64_t end, int64_t column,
                            int64_t columns) {
  for (int64_t row = begin; row < end; row += 2) {
    const bf16* even = row_of(from, row) + column;
    const bf16* odd = row + 1 < end ? row_of(from, row + 1) + column : nullptr;
    for (int64_t first = 0; first < columns; first += kPanel, ++panels)
      for (int64_t i = 0; i < kPanel; i += kLanes) {
        const int64_t j = first + i;
        const f32x16 low = j < columns ? load(even + j, columns - j) : f32x16{};
        const f32x16 high = j < columns && odd != nullptr ? load(odd + j, columns - j) : f32x16{};
        // unpacked, an element is the upper half of its lane
        const u32x16 pairs = (reinterpret_cast<u32x16>(low) >> 16) | reinterpret_cast<u32x16>(high);
        pack(reinterpret_cast<float*>(panels->of[i]), reinterpret_cast<f32x16>(pairs));
      }
  }
}

}  // namespace mtfast::concat_mlp
#else
namespace mtfast::concat_mlp {

bool has_bf16_product() { return false; }  // so that nobody calls the rest

void multiply(const PanelProduct&) {}
void pack_rows(Pairs*, const Source&, int64_t, int64_t, int64_t) {}
void interleave(Pairs*, const Source&, int64_t, int64_t, int64_t, int64_t) {}

}  // namespace mtfast::concat_mlp
#endif
