// Products of bfloat16 matrices with the dot product instruction of AVX-512 BF16, which adds two neighbours'
// products at a time: sums of 6 rows by 64 columns stay in registers, and panels of 64 columns of the right
// matrix are packed in pairs.
#pragma once
#include "simd.h"

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

// ---- packing: columns beyond `columns`, to the end of the last panel, become zeros ----

// Of a right matrix whose columns are rows in memory: panel[k].of[j] = elements 2k and 2k + 1 of the row at
// from + j * pitch.
void pack_rows(Pairs* panel, const bf16* from, int64_t pitch, int64_t columns, int64_t pairs);

// Of one whose rows are rows in memory: elements j of both, in as many panels as they have columns for; a row
// that is null is zeros.
void interleave(Pairs* panels, const bf16* even, const bf16* odd, int64_t columns);

}  // namespace mtfast::simd
