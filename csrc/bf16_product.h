// Products of bfloat16 matrices with the dot product instruction of AVX-512 BF16, which adds two neighbours'
// products at a time: sums of 6 rows by 64 columns stay in registers, and panels of 64 columns of the right
// matrix are packed in pairs.
#pragma once
#include "simd_isa.h"

namespace mtfast::simd {

constexpr int kPanel = 64;                      // columns whose sums the registers hold
constexpr int kPanelVectors = kPanel / kLanes;  // of sums; of pairs too: one is as wide as a float
constexpr int kTileRows = 6;  // 6 x 4 sums, 4 vectors of the panel and a pair fill the registers

struct alignas(64) Pairs {  // two neighbours along the sum, of each of a panel's columns
  bf16 of[kPanel][2];
};

// Whether this processor has the instruction. Not where it has AMX, with which torch's library is faster.
bool has_bf16_product();

// to [rows, columns] = start + a b, over one panel of b. a is in one or two parts, which lie side by side.
struct PanelProduct {
  int64_t rows = 0, columns = 0;
  const bf16* const* a[2] = {};  // pair k of row i of a part is at a[part][i] + k * step
  int parts = 1;
  int64_t step = 2, pairs = 0;   // pairs of a part
  const Pairs* b = nullptr;      // [parts * pairs]
  const float* start = nullptr;  // null: what is in `to`
  int64_t start_pitch = 0;       // 0: all rows start alike
  bf16* to = nullptr;
  int64_t to_pitch = 0;
  float* sums = nullptr;  // unless null, the result is left in these [rows, kPanel], which may be `start`
};

void multiply(const PanelProduct& product);

// ---- packing: columns beyond `columns` of a panel become zeros ----

// Of a right matrix whose columns are rows in memory: panel[k].of[j] = elements 2k and 2k + 1 of the row at
// from + j * pitch.
MTFAST_INLINE void pack_rows(Pairs* panel, const bf16* from, int64_t pitch, int64_t columns, int64_t pairs) {
  for (int j = 0; j < kPanel; j += kLanes)
    for (int64_t k = 0; k < pairs; k += kLanes) {
      f32x16 x[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        x[i] = j + i < columns ? load(reinterpret_cast<const float*>(from + (j + i) * pitch) + k, pairs - k)
                               : f32x16{};
      transpose16(x);
      for (int i = 0; i < kLanes && k + i < pairs; ++i)
        pack(reinterpret_cast<float*>(panel[k + i].of[j]), x[i]);
    }
}

// Of one whose rows are rows in memory: pairs.of[j] = element j of both; a row that is null is zeros.
MTFAST_INLINE void interleave(Pairs& pairs, const bf16* even, const bf16* odd, int64_t columns) {
  for (int64_t j = 0; j < kPanel; j += kLanes) {
    const f32x16 low = j < columns ? load(even + j, columns - j) : f32x16{};
    const f32x16 high = j < columns && odd != nullptr ? load(odd + j, columns - j) : f32x16{};
    // unpacked, an element is the upper half of its lane
    pack(reinterpret_cast<float*>(pairs.of[j]),
         reinterpret_cast<f32x16>((reinterpret_cast<u32x16>(low) >> 16) | reinterpret_cast<u32x16>(high)));
  }
}

}  // namespace mtfast::simd
