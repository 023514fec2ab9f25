// Products of bfloat16 matrices with the dot product instruction of AVX-512 BF16, which adds two neighbours'
// products at a time: sums of 6 rows by 64 columns stay in registers, and panels of 64 columns of the right
// matrix are packed in pairs.
#pragma once
#include "concat_mlp.h"
#include "simd.h"

namespace mtfast::concat_mlp {

using simd::bf16;

constexpr int kPanel = 64;  // columns whose sums the registers hold

struct alignas(64) Pairs {  // two neighbours along the sum, of each of a panel's columns
  bf16 of[kPanel][2];
};

inline const bf16* row_of(const Source& from, int64_t i) {
  if (from.rows != nullptr)
    i = from.wide_rows ? static_cast<const int64_t*>(from.rows)[i]
                       : static_cast<const int32_t*>(from.rows)[i];
  return static_cast<const bf16*>(from.data) + i * from.pitch;
}

// Whether this processor has the instruction. Not where it has AMX, with which torch's library is faster.
bool has_bf16_product();

// to = start + a b, for rows begin .. end of a and one panel of b. a is in one or two parts, which lie side
// by side. `to`, `start` and `sums` are those of row `begin`.
struct PanelProduct {
  int64_t begin = 0, end = 0, columns = 0;
  Source a[2] = {};  // pair k of row i of a part is at row_of(part, i) + k * step
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

// Of a right matrix whose columns are rows in memory, `columns` of them from row `begin` on: neighbours in a
// row make a pair.
void pack_rows(Pairs* panel, const Source& from, int64_t begin, int64_t columns, int64_t pairs);

// Of one whose rows are rows in memory, from `column` on: neighbours in a column make a pair, those of each
// two rows as many panels as they fill; a row that is missing at the end is zeros.
void interleave(Pairs* panels, const Source& from, int64_t begin, int64_t end, int64_t column,
                int64_t columns);

}  // namespace mtfast::concat_mlp
