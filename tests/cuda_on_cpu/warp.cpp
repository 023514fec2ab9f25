// What a warp-wide operation does once all its lanes are there.
#include "machine.h"

namespace cuda_on_cpu {
namespace {

void ballot(Operands* const (&lane)[32]) {
  uint32_t bits = 0;
  for (int l = 0; l < 32; ++l)
    if (lane[l] && lane[l]->word[0]) bits |= 1u << l;
  for (Operands* o : lane)
    if (o) o->word[0] = bits;
}

void shuffle(Operands* const (&lane)[32]) {
  uint32_t value[32][2];
  for (int l = 0; l < 32; ++l)
    if (lane[l]) std::memcpy(value[l], lane[l]->word, sizeof value[l]);
  for (int l = 0; l < 32; ++l) {
    if (!lane[l]) continue;
    const int source = lane[l]->source;
    if (!lane[source]) return fail("shuffle: lane %d reads lane %d, which is not in the mask", l, source);
    std::memcpy(lane[l]->word, value[source], sizeof value[source]);
  }
}

void load_matrices(Operands* const (&lane)[32], Thread* const (&thread)[32], bool transposed) {
  uint16_t matrix[4][8][8];
  for (int l = 0; l < 32; ++l) {
    const auto* row = static_cast<const unsigned char*>(lane[l]->address);
    if (reinterpret_cast<uintptr_t>(row) % 16)
      return fail("ldmatrix: lane %d's row is not aligned to 16 bytes", l);
    if (row < block.shared || row + 16 > block.shared + block.shared_bytes)
      return fail("ldmatrix: lane %d's row is outside the block's %zu bytes of shared memory", l,
                  block.shared_bytes);
    Thread* const caller = current;
    current = thread[l];
    note_access(row, 16, false, false, nullptr);
    current = caller;
    std::memcpy(matrix[l / 8][l % 8], row, 16);
  }
  for (int l = 0; l < 32; ++l)
    for (int m = 0; m < 4; ++m) {
      const int row = l / 4, column = l % 4 * 2;
      const uint32_t low = transposed ? matrix[m][column][row] : matrix[m][row][column];
      const uint32_t high = transposed ? matrix[m][column + 1][row] : matrix[m][row][column + 1];
      lane[l]->word[m] = low | high << 16;
    }
}

float element(uint32_t pair, int which, bool bf16) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * which));
  return bf16 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
}

// m16n8k16; which element of which fragment register is where is in the PTX manual, "Matrix fragments for
// mma.m16n8k16".
void multiply_add(Operands* const (&lane)[32], bool bf16) {
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l)
    for (int e = 0; e < 2; ++e) {
      const int group = l / 4, pair = l % 4 * 2 + e;
      const uint32_t* word = lane[l]->word;
      a[group][pair] = element(word[0], e, bf16);
      a[group + 8][pair] = element(word[1], e, bf16);
      a[group][pair + 8] = element(word[2], e, bf16);
      a[group + 8][pair + 8] = element(word[3], e, bf16);
      b[pair][group] = element(word[4], e, bf16);
      b[pair + 8][group] = element(word[5], e, bf16);
    }
  float c[16][8] = {};
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
  for (int l = 0; l < 32; ++l)
    for (int e = 0; e < 2; ++e) {
      lane[l]->accumulator[e] += c[l / 4][l % 4 * 2 + e];
      lane[l]->accumulator[2 + e] += c[l / 4 + 8][l % 4 * 2 + e];
    }
}

}  // namespace

void act(Collective what, Operands* const (&lane)[32], Thread* const (&thread)[32]) {
  switch (what) {
    case Collective::kSync:
      for (Thread* t : thread)
        if (t) {
          ++block.warp_interval[t->warp];
          return;
        }
      return;
    case Collective::kBallot:
      return ballot(lane);
    case Collective::kShuffle:
      return shuffle(lane);
    case Collective::kMatrix:
    case Collective::kMatrixTransposed:
      return load_matrices(lane, thread, what == Collective::kMatrixTransposed);
    case Collective::kMmaBf16:
    case Collective::kMmaFp16:
      return multiply_add(lane, what == Collective::kMmaBf16);
  }
}

}  // namespace cuda_on_cpu
