// Sixteen queries at a time lie in the sixteen lanes: a step of the softmax along the keys is then one of
// whole vectors, and the words of Philox calls fall where they are wanted. Weights and the gradients of
// scores are rounded to bfloat16 where they are multiplied, as on GPUs; all sums are float.
#include "packed_attention_bf16.h"

#include <algorithm>
#include <cmath>

#include "packed_attention_cpu.h"
#include "packed_attention_pairs.h"

#if defined(__x86_64__) && defined(__GNUC__)

namespace mtfast::attention {
namespace {

constexpr int64_t kBlockRows = 64;  // queries whose weights wait for the products along them

// keep[j]: whether column j is kept, a bit for each of the sixteen rows from `row` on. Fills whole groups of
// sixteen columns, as far as there are any. The sixteen calls of one philox16 are those of eight rows and two
// pairs of columns, which give the draws of sixteen rows and eight columns.
MTFAST_BF16 void draw_keep(__mmask16* keep, const AttentionShape& shape, int64_t head, int64_t begin,
                           int64_t row, int64_t columns) {
  if (shape.threshold == 0) {
    for (int64_t j = 0; j < round_up(columns, 2); ++j) keep[j] = 0xffff;
    return;
  }
  const __m512i threshold = _mm512_set1_epi32(static_cast<int32_t>(shape.threshold << 16));
  u32x16 rows, pairs;
  for (uint32_t i = 0; i < kLanes; ++i) {
    rows[i] = i % 8;
    pairs[i] = i / 8;
  }
  rows += static_cast<uint32_t>(begin + row);
  for (int64_t group = 0; group < columns; group += 16)
    for (int64_t column = group; column < group + 8 && column < columns; column += 4) {
      u32x16 words[4];
      philox16<Isa::kAvx512>(*shape.seed, rows, pairs + static_cast<uint32_t>(group / 4 + column % 8 / 2),
                             static_cast<uint32_t>(head), Purpose::kAttentionDropout, words);
#pragma GCC unroll 2
      for (int right = 0; right < 2; ++right) {
        const __m512i upper = (__m512i)words[2 * right], lower = (__m512i)words[2 * right + 1];
        const __m512i draws[2] = {_mm512_shuffle_i64x2(upper, lower, 0x44),
                                  _mm512_shuffle_i64x2(upper, lower, 0xee)};
#pragma GCC unroll 2
        for (int pair = 0; pair < 2; ++pair) {
          __mmask16* to = keep + column + 8 * right + 2 * pair;
          to[0] = _mm512_cmpge_epu32_mask(_mm512_slli_epi32(draws[pair], 16), threshold);
          to[1] = _mm512_cmpge_epu32_mask(draws[pair], threshold);
        }
      }
    }
}

// Scores [length, 16] become ones in powers of two; returns the largest of each lane. If the length is odd,
// a row of minus infinity follows.
MTFAST_BF16_INLINE f32x16 scale_scores(float* scores, int64_t length, float factor) {
  const f32x16 lowest = splat<f32x16>(-INFINITY);
  f32x16 even = lowest, odd = lowest;
  for (int64_t j = 0; j < length; j += 2) {
    float* to = scores + j * kLanes;
    const f32x16 x = unpack(to) * factor, y = j + 1 < length ? unpack(to + kLanes) * factor : lowest;
    even = x > even ? x : even;
    odd = y > odd ? y : odd;
    pack(to, x);
    pack(to + kLanes, y);
  }
  return even > odd ? even : odd;
}

// 2^x for x up to 0, which needs less than exp2: the same series.
MTFAST_BF16_INLINE f32x16 exp2_of_negative(f32x16 x) {
  x = splat<f32x16>(-200) > x ? splat<f32x16>(-200) : x;  // minus infinity less itself would be NaN
  const f32x16 n = (f32x16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT), f = x - n;
  f32x16 y = f * 1.5252733804e-5f + 1.5403530393e-4f;
  y = y * f + 1.3333558146e-3f;
  y = y * f + 9.6181291076e-3f;
  y = y * f + 5.5504108665e-2f;
  y = y * f + 2.4022650696e-1f;
  y = y * f + 6.9314718056e-1f;
  y = y * f + 1.0f;
  return (f32x16)_mm512_scalef_ps((__m512)y, (__m512)n);
}

// The pairs of two rows of lanes, rounded.
MTFAST_BF16_INLINE __m512i both_rounded(f32x16 even, f32x16 odd) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
}

// Two rows of sixteen, kBlockRows apart.
MTFAST_BF16_INLINE void write_halves(bf16* to, __m512i rows) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(rows));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kBlockRows), _mm512_extracti64x4_epi64(rows, 1));
}

// rows: paired; lanes: sixteen queries transposed; scores: [length, 16]; weights, or gradients of scores:
// pairs of keys [length / 2, 16]; sums: what becomes sixteen rows of the result.
struct Scratch {
  bf16 *rows, *lanes, *weights;
  float *scores, *sums;
  __mmask16* keep;
  // backward; used and slopes: the weights and the gradients of scores of a block, [length, kBlockRows]
  bf16 *q_rows, *dout_rows, *used, *slopes;
  float *dweights, *dk, *dv;

  Scratch(Arena& arena, int64_t length, int64_t D, bool backward) {
    const int64_t L = round_up(length, kLanes);
    rows = arena.take<bf16>(L * D);
    lanes = arena.take<bf16>(kLanes * D);
    weights = arena.take<bf16>(L * kLanes);
    scores = arena.take<float>(L * kLanes);
    sums = arena.take<float>(kLanes * D);
    keep = arena.take<__mmask16>(L);
    if (!backward) return;
    q_rows = arena.take<bf16>(kBlockRows * D);
    dout_rows = arena.take<bf16>(kBlockRows * D);
    used = arena.take<bf16>(L * kBlockRows);
    slopes = arena.take<bf16>(L * kBlockRows);
    dweights = arena.take<float>(L * kLanes);
    dk = arena.take<float>(L * D);
    dv = arena.take<float>(L * D);
  }
};

// to [length, 16] = the products of the sequence's rows of x and sixteen rows in `lanes`.
void by_keys(float* to, const AttentionTensor& x, const Extent& at, int64_t head, const bf16* lanes,
             int64_t D) {
  const bf16* keys = row_of<const bf16>(x, at.begin, head);
  multiply(PairProduct{keys, x.row_stride, 2, lanes, kLanes, D / 2, to, kLanes}, at.length, kLanes);
}

// to [queries, D] = sums of paired rows of keys by the weights' pairs [length / 2, 16].
void over_keys(float* to, const bf16* weights, int64_t queries, const bf16* rows, int64_t length, int64_t D) {
  multiply(PairProduct{weights, 2, 2 * kLanes, rows, D, (length + 1) / 2, to, D}, queries, D);
}

// to [length, D] (+)= sums of a block's paired rows of queries by weights [length, kBlockRows].
void over_queries(float* to, const bf16* weights, int64_t length, const bf16* rows, int64_t queries,
                  int64_t D, bool accumulate) {
  multiply(PairProduct{weights, kBlockRows, 2, rows, D, (queries + 1) / 2, to, D, accumulate}, length, D);
}

// Asks for rows ahead of their use, to be read or written.
template <bool kWrite>
MTFAST_BF16_INLINE void prefetch_rows(const AttentionTensor& x, const Extent& at, int64_t head, int64_t D) {
  for (int64_t i = 0; i < at.length; ++i)
    for (int64_t d = 0; d < D; d += 32)
      __builtin_prefetch(row_of<const bf16>(x, at.begin + i, head) + d, kWrite);
}

// Scores to pairs of weights that are yet to be divided by their sums; returns those.
MTFAST_BF16_INLINE f32x16 weigh(const Scratch& b, int64_t length, f32x16 top) {
  const __m512i pairs = pairing(0, 16);
  f32x16 total[2] = {};
  for (int64_t j = 0; j < length; j += 2) {
    f32x16 x[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      x[i] = exp2_of_negative(unpack(b.scores + (j + i) * kLanes) - top);
      total[i] += x[i];
      x[i] = (f32x16)_mm512_maskz_mov_ps(b.keep[j + i], (__m512)x[i]);
    }
    _mm512_storeu_si512(b.weights + j * kLanes, _mm512_permutexvar_epi16(pairs, both_rounded(x[0], x[1])));
  }
  return total[0] + total[1];
}

// Scores to the weights used, the weights' gradients to those of scores, for sixteen queries from `column` of
// a block on; `there` says which of them exist, the others get zeros. The softmax is taken anew, as for all
// types.
MTFAST_BF16_INLINE void differentiate(const Scratch& b, int64_t length, int64_t column, __mmask16 there,
                                      f32x16 top, float scale) {
  f32x16 total[2] = {}, dot[2] = {};
  if (length % 2) pack(b.dweights + length * kLanes, f32x16{});
  for (int64_t j = 0; j < length; j += 2)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      float *score = b.scores + (j + i) * kLanes, *dweight = b.dweights + (j + i) * kLanes;
      const f32x16 x = exp2_of_negative(unpack(score) - top);
      const f32x16 dx =
          (f32x16)_mm512_maskz_mul_ps(b.keep[j + i], (__m512)unpack(dweight), _mm512_set1_ps(scale));
      total[i] += x;
      dot[i] += x * dx;
      pack(score, x);
      pack(dweight, dx);
    }
  const f32x16 factor = 1.0f / (total[0] + total[1]), delta = (dot[0] + dot[1]) * factor;
  const __m512i pairs = pairing(0, 16);
  for (int64_t j = 0; j < length; j += 2) {
    f32x16 used[2], slope[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const f32x16 x = unpack(b.scores + (j + i) * kLanes) * factor;
      const f32x16 dx = unpack(b.dweights + (j + i) * kLanes) - delta;
      slope[i] = (f32x16)_mm512_maskz_mul_ps(there, (__m512)x, (__m512)dx);
      used[i] = (f32x16)_mm512_maskz_mul_ps(there & b.keep[j + i], (__m512)x, _mm512_set1_ps(scale));
    }
    const __m512i slopes = both_rounded(slope[0], slope[1]);
    write_halves(b.used + j * kBlockRows + column, both_rounded(used[0], used[1]));
    write_halves(b.slopes + j * kBlockRows + column, slopes);
    _mm512_storeu_si512(b.weights + j * kLanes, _mm512_permutexvar_epi16(pairs, slopes));
  }
}

}  // namespace

int64_t scratch_of_bf16(int64_t length, int64_t head_dim, bool backward) {
  Arena measure{nullptr};
  Scratch(measure, length, head_dim, backward);
  return measure.used;
}

MTFAST_BF16 void forward_bf16(const AttentionForward& args, int64_t sequence, int64_t head, char* scratch) {
  const AttentionShape& shape = args.shape;
  const int64_t D = shape.head_dim;
  const Extent at(shape, sequence);
  if (at.length <= 0) return;
  Arena arena{scratch};
  const Scratch b(arena, at.length, D, false);
  pair_rows(b.rows, args.v, at.begin, at.length, head, D);
  float* stats = statistics_of<float>(args.stats, head * shape.total + at.begin);
  for (int64_t r = 0; r < at.length; r += kLanes) {
    const int64_t queries = std::min<int64_t>(at.length - r, kLanes);
    transpose_pairs(b.lanes, args.q, at.begin + r, queries, head, D);
    by_keys(b.scores, args.k, at, head, b.lanes, D);
    draw_keep(b.keep, shape, head, at.begin, r, at.length);
    const f32x16 top = scale_scores(b.scores, at.length, static_cast<float>(shape.softmax_scale * kLog2E));
    const f32x16 total = weigh(b, at.length, top), factor = keep_scale<float>(shape) / total;
    over_keys(b.sums, b.weights, queries, b.rows, at.length, D);
    alignas(64) float tops[kLanes], totals[kLanes], factors[kLanes];
    pack(tops, top);
    pack(totals, total);
    pack(factors, factor);
    write_rows(args.out, b.sums, at.begin + r, queries, head, D, factors, 1);
    for (int64_t i = 0; i < queries; ++i) {
      stats[2 * (r + i)] = tops[i];
      stats[2 * (r + i) + 1] = totals[i];
    }
  }
}

MTFAST_BF16 void backward_bf16(const AttentionBackward& args, int64_t sequence, int64_t head, char* scratch) {
  const AttentionShape& shape = args.shape;
  const int64_t D = shape.head_dim;
  const Extent at(shape, sequence);
  if (at.length <= 0) return;
  Arena arena{scratch};
  const Scratch b(arena, at.length, D, true);
  const float scale = static_cast<float>(shape.softmax_scale), one = 1;
  pair_rows(b.rows, args.k, at.begin, at.length, head, D);
  for (int64_t block = 0; block < at.length; block += kBlockRows) {
    const int64_t rows = std::min(at.length - block, kBlockRows);
    pair_rows(b.q_rows, args.q, at.begin + block, rows, head, D);
    if (block == 0) prefetch_rows<false>(args.v, at, head, D);
    pair_rows(b.dout_rows, args.dout, at.begin + block, rows, head, D);
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t first = at.begin + block + r, queries = std::min<int64_t>(rows - r, kLanes);
      transpose_pairs(b.lanes, args.q, first, queries, head, D);
      by_keys(b.scores, args.k, at, head, b.lanes, D);
      transpose_pairs(b.lanes, args.dout, first, queries, head, D);
      by_keys(b.dweights, args.v, at, head, b.lanes, D);
      draw_keep(b.keep, shape, head, at.begin, block + r, at.length);
      const f32x16 top = scale_scores(b.scores, at.length, static_cast<float>(shape.softmax_scale * kLog2E));
      differentiate(b, at.length, r, static_cast<__mmask16>((1u << queries) - 1), top,
                    keep_scale<float>(shape));
      over_keys(b.sums, b.weights, queries, b.rows, at.length, D);
      write_rows(args.dq, b.sums, first, queries, head, D, &scale, 0);
    }
    if (block + rows == at.length) {
      prefetch_rows<true>(args.dv, at, head, D);
      prefetch_rows<true>(args.dk, at, head, D);
    }
    over_queries(b.dv, b.used, at.length, b.dout_rows, rows, D, block > 0);
    over_queries(b.dk, b.slopes, at.length, b.q_rows, rows, D, block > 0);
  }
  write_rows(args.dk, b.dk, at.begin, at.length, head, D, &scale, 0);
  write_rows(args.dv, b.dv, at.begin, at.length, head, D, &one, 0);
}

}  // namespace mtfast::attention
#else
namespace mtfast::attention {

int64_t scratch_of_bf16(int64_t, int64_t, bool) { return 0; }  // nobody calls these
void forward_bf16(const AttentionForward&, int64_t, int64_t, char*) {}
void backward_bf16(const AttentionBackward&, int64_t, int64_t, char*) {}

}  // namespace mtfast::attention
#endif
