// The CPU kernels of packed attention, included once per instruction set with MTFAST_VECTOR_BYTES and
// MTFAST_AVX (0 portable, 2 AVX2, 512 AVX-512) defined; hence no include guard. Nothing from the standard
// library is instantiated here, so that no symbol built for one instruction set can stand in for another's.
//
// One task is one (sequence, head). Rows are widened to float scratch, keys (and, backward, values) are
// transposed on the way, and every product is then `matmul`: broadcast an element of A, multiply a row of B.

template <class C>
struct Simd {
  static constexpr int N = MTFAST_VECTOR_BYTES / sizeof(C);
  typedef C V __attribute__((vector_size(MTFAST_VECTOR_BYTES), may_alias));
  typedef C U __attribute__((vector_size(MTFAST_VECTOR_BYTES), may_alias, aligned(2)));  // unaligned
};
template <class C>
using Vec = typename Simd<C>::V;
typedef int32_t Int32 __attribute__((vector_size(MTFAST_VECTOR_BYTES)));
typedef uint32_t UInt32 __attribute__((vector_size(MTFAST_VECTOR_BYTES)));
typedef int64_t Int64 __attribute__((vector_size(MTFAST_VECTOR_BYTES)));
typedef uint64_t UInt64 __attribute__((vector_size(MTFAST_VECTOR_BYTES)));
typedef uint16_t UInt16Half __attribute__((vector_size(MTFAST_VECTOR_BYTES / 2), may_alias, aligned(2)));
typedef uint16_t UInt16Quarter __attribute__((vector_size(MTFAST_VECTOR_BYTES / 4), may_alias, aligned(2)));

template <class C>
struct Mask;
template <>
struct Mask<float> {
  typedef Int32 I;
  typedef UInt16Half Draws;
};
template <>
struct Mask<double> {
  typedef Int64 I;
  typedef UInt16Quarter Draws;
};

template <class C>
inline Vec<C> splat(C x) {
  return x - Vec<C>{};
}

// ---- element types
// -------------------------------------------------------------------------------------------

inline Vec<float> load(const float* p) { return *(const Simd<float>::U*)p; }
inline Vec<double> load(const double* p) { return *(const Simd<double>::U*)p; }
inline void store(float* p, Vec<float> x) { *(Simd<float>::U*)p = x; }
inline void store(double* p, Vec<double> x) { *(Simd<double>::U*)p = x; }

inline Vec<float> load(const Bf16* p) {
  return (Vec<float>)(__builtin_convertvector(*(const UInt16Half*)p, UInt32) << 16);
}
inline void store(Bf16* p, Vec<float> x) {
  const UInt32 bits = (UInt32)x;
  const UInt32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const UInt32 nan = (bits >> 16) | 0x40u;
  *(UInt16Half*)p = __builtin_convertvector(x == x ? rounded : nan, UInt16Half);
}

#if MTFAST_AVX == 512
inline Vec<float> load(const Half* p) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
inline void store(Half* p, Vec<float> x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, 0)); }
#elif MTFAST_AVX == 2
inline Vec<float> load(const Half* p) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
inline void store(Half* p, Vec<float> x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, 0)); }
#else
inline Vec<float> load(const Half* p) {
  Vec<float> x;
  for (int i = 0; i < Simd<float>::N; ++i) x[i] = half_to_float(p[i].bits);
  return x;
}
inline void store(Half* p, Vec<float> x) {
  for (int i = 0; i < Simd<float>::N; ++i) p[i].bits = float_to_half(x[i]);
}
#endif

// ---- arithmetic
// ----------------------------------------------------------------------------------------------

template <class C>
inline C sum(Vec<C> x) {
  C lanes[Simd<C>::N];
  store(lanes, x);
  for (int n = Simd<C>::N / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  return lanes[0];
}
template <class C>
inline C maximum(Vec<C> x) {
  C lanes[Simd<C>::N];
  store(lanes, x);
  for (int n = Simd<C>::N / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] = lanes[i] > lanes[i + n] ? lanes[i] : lanes[i + n];
  return lanes[0];
}

// 2^x for x <= 0 (a little above is fine): x = n + f with |f| <= 1/2, Taylor series of 2^f, n into the
// exponent.
inline Vec<float> power2(Vec<float> x) {
  x = x < -126.0f ? splat(-126.0f) : x;
  const Vec<float> shifted = x + 12582912.0f;  // 1.5 * 2^23: the low bits now hold round(x)
  const Vec<float> f = x - (shifted - 12582912.0f);
  Vec<float> y = splat(1.5252733804e-5f);
  y = y * f + 1.5403530393e-4f;
  y = y * f + 1.3333558146e-3f;
  y = y * f + 9.6181291076e-3f;
  y = y * f + 5.5504108665e-2f;
  y = y * f + 2.4022650696e-1f;
  y = y * f + 6.9314718056e-1f;
  y = y * f + 1.0f;
  return (Vec<float>)((Int32)y + ((Int32)shifted << 23));
}
inline Vec<double> power2(Vec<double> x) {
  for (int i = 0; i < Simd<double>::N; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}
inline float log_2(float x) { return __builtin_log2f(x); }
inline double log_2(double x) { return __builtin_log2(x); }

// c[MR, NV vectors] (+)= a * b, b and c rows aligned. a is [MR, K] or, Transposed, [K, MR].
template <class C, int MR, int NV, bool Transposed>
inline void tile(const C* a, int64_t lda, const C* b, int64_t ldb, C* c, int64_t ldc, int64_t K,
                 bool accumulate) {
  constexpr int N = Simd<C>::N;
  Vec<C> acc[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) acc[m][n] = Vec<C>{};
  for (int64_t k = 0; k < K; ++k) {
    Vec<C> row[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) row[n] = *(const Vec<C>*)(b + k * ldb + n * N);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec<C> x = splat(Transposed ? a[k * lda + m] : a[m * lda + k]);
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) acc[m][n] += x * row[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      Vec<C>& to = *(Vec<C>*)(c + m * ldc + n * N);
      to = accumulate ? to + acc[m][n] : acc[m][n];
    }
}

template <class C, int NV, bool Transposed>
inline void tile_column(int64_t M, const C* a, int64_t lda, const C* b, int64_t ldb, C* c, int64_t ldc,
                        int64_t K, bool accumulate) {
  constexpr int kRows = MTFAST_AVX == 512 && NV <= 3 ? 8 : 4;
  const int64_t step = Transposed ? 1 : lda;
  int64_t m = 0;
  for (; m + kRows <= M; m += kRows)
    tile<C, kRows, NV, Transposed>(a + m * step, lda, b, ldb, c + m * ldc, ldc, K, accumulate);
  for (; m < M; m += 4)
    tile<C, 4, NV, Transposed>(a + m * step, lda, b, ldb, c + m * ldc, ldc, K, accumulate);
}

constexpr int64_t kSummed = 128;

// c [M, N] (+)= a [M, K] b [K, N], M a multiple of 4, N of the vector.
template <class C, bool Transposed>
void matmul(int64_t M, int64_t N, int64_t K, const C* a, int64_t lda, const C* b, int64_t ldb, C* c,
            int64_t ldc, bool accumulate) {
  constexpr int W = Simd<C>::N;
  if (K > kSummed) {  // sums of sums: long ones would round at every step
    for (int64_t k = 0; k < K; k += kSummed)
      matmul<C, Transposed>(M, N, K - k < kSummed ? K - k : kSummed, a + k * (Transposed ? lda : 1), lda,
                            b + k * ldb, ldb, c, ldc, accumulate || k > 0);
    return;
  }
  int64_t n = 0;
#if MTFAST_AVX == 512
  for (; n + 4 * W <= N; n += 4 * W)
    tile_column<C, 4, Transposed>(M, a, lda, b + n, ldb, c + n, ldc, K, accumulate);
  if (n + 3 * W <= N) {
    tile_column<C, 3, Transposed>(M, a, lda, b + n, ldb, c + n, ldc, K, accumulate);
    n += 3 * W;
  }
#endif
  for (; n + 2 * W <= N; n += 2 * W)
    tile_column<C, 2, Transposed>(M, a, lda, b + n, ldb, c + n, ldc, K, accumulate);
  if (n < N) tile_column<C, 1, Transposed>(M, a, lda, b + n, ldb, c + n, ldc, K, accumulate);
}

// ---- moving rows
// ---------------------------------------------------------------------------------------------

template <class T>
inline const T* row_of(const AttentionTensor& x, int64_t row, int64_t head) {
  return (const T*)x.data + row * x.row_stride + head * x.head_stride;
}
template <class T>
inline T* row_of_mutable(const AttentionTensor& x, int64_t row, int64_t head) {
  return (T*)x.data + row * x.row_stride + head * x.head_stride;
}

// to [rows padded with zeros, D] = factor * x[first : first + rows, head]
template <class T, class C>
void gather(C* to, const AttentionTensor& x, int64_t first, int64_t rows, int64_t padded, int64_t head,
            int64_t D, C factor) {
  constexpr int W = Simd<C>::N;
  for (int64_t i = 0; i < rows; ++i) {
    const T* from = row_of<T>(x, first + i, head);
    for (int64_t d = 0; d < D; d += W) *(Vec<C>*)(to + i * D + d) = load(from + d) * factor;
  }
  for (int64_t i = rows * D; i < padded * D; i += W) *(Vec<C>*)(to + i) = Vec<C>{};
}

template <class T, class C>
void scatter(const AttentionTensor& x, const C* from, int64_t first, int64_t rows, int64_t head, int64_t D,
             C factor) {
  constexpr int W = Simd<C>::N;
  for (int64_t i = 0; i < rows; ++i) {
    T* to = row_of_mutable<T>(x, first + i, head);
    for (int64_t d = 0; d < D; d += W) store(to + d, *(const Vec<C>*)(from + i * D + d) * factor);
  }
}

// One stage of an in-register transpose: exchange the off-diagonal S x S blocks of each 2S x 2S block.
template <class C, int S>
inline void exchange(Vec<C> (&x)[Simd<C>::N]) {
  constexpr int W = Simd<C>::N;
  typename Mask<C>::I low, high;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    low[i] = (i & S) ? W + i - S : i;
    high[i] = (i & S) ? W + i : i + S;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & S) continue;
    const Vec<C> a = x[i], b = x[i + S];
    x[i] = __builtin_shuffle(a, b, low);
    x[i + S] = __builtin_shuffle(a, b, high);
  }
}

// to [D, ld] = from [rows, D] transposed; rows a multiple of the vector.
template <class C>
void transpose(C* to, int64_t ld, const C* from, int64_t rows, int64_t D) {
  constexpr int W = Simd<C>::N;
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t d = 0; d < D; d += W) {
      Vec<C> x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) x[i] = *(const Vec<C>*)(from + (r + i) * D + d);
      exchange<C, 1>(x);
      exchange<C, 2>(x);
      if constexpr (W >= 8) exchange<C, 4>(x);
      if constexpr (W >= 16) exchange<C, 8>(x);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) *(Vec<C>*)(to + (d + i) * ld + r) = x[i];
    }
}

// ---- dropout
// -------------------------------------------------------------------------------------------------

inline UInt64 multiply_low(UInt64 a, uint32_t b) {  // 64-bit product of the low halves
#if MTFAST_AVX == 512
  return (UInt64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif MTFAST_AVX == 2
  return (UInt64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

// Draws of rows [row, row + rows) of the batch and columns [0, columns) of the sequence; that of (row + i, j)
// is draws[i * result + j].
inline int64_t draw(uint16_t* draws, uint64_t seed, int64_t head, int64_t row, int64_t rows,
                    int64_t columns) {
  constexpr int W = MTFAST_VECTOR_BYTES / 8;
  const int64_t groups = (columns + 7) / 8, calls = rows * groups;
  int64_t next_row = row, next_group = 0;
  for (int64_t call = 0; call < calls; call += W) {
    UInt64 c0, c1;
    for (int i = 0; i < W; ++i) {
      const int lane =
          i < W / 2 ? 2 * i : 2 * (i - W / 2) + 1;  // so that the stores below come in call order
      c0[lane] = next_row;
      c1[lane] = next_group;
      if (++next_group == groups) next_group = 0, ++next_row;
    }
    UInt64 c2 = (uint64_t)head - UInt64{}, c3 = (uint64_t)Purpose::kAttentionDropout - UInt64{};
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const UInt64 p0 = multiply_low(c0, 0xD2511F53u), p1 = multiply_low(c2, 0xCD9E8D57u);
      c0 =
          (p1 >> 32) ^ c1 ^ (uint64_t)k0;  // garbage above bit 31 is harmless: only low halves are multiplied
      c1 = p1;
      c2 = (p0 >> 32) ^ c3 ^ (uint64_t)k1;
      c3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const UInt64 first = (c0 & 0xFFFFFFFFu) | (c1 << 32), second = (c2 & 0xFFFFFFFFu) | (c3 << 32);
    Int64 even, odd;
    for (int i = 0; i < W; ++i) {
      even[i] = (i & 1 ? W : 0) + (i & ~1);
      odd[i] = even[i] + 1;
    }
    UInt64* to = (UInt64*)(draws + call * 8);
    to[0] = __builtin_shuffle(first, second, even);
    to[1] = __builtin_shuffle(first, second, odd);
  }
  return groups * 8;
}

template <class C>
inline typename Mask<C>::I kept(const uint16_t* draws, uint32_t threshold) {
  typedef typename Mask<C>::I I;
  return __builtin_convertvector(*(const typename Mask<C>::Draws*)draws, I) >= (I{} + (int)threshold);
}

// ---- a sequence and a head
// -----------------------------------------------------------------------------------

constexpr int64_t kBlockRows = 64;

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Hands out aligned pieces of one buffer; with a null buffer it only measures.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class X>
  X* take(int64_t count) {
    X* p = (X*)(base + used);
    used += round_up(count * (int64_t)sizeof(X), 64);
    return p;
  }
};

template <class C>
struct Buffers {
  C *q, *k, *kt, *v, *vt, *dout, *p, *dp, *out, *dk, *dv;
  uint16_t* draws;

  Buffers(Arena& arena, int64_t length, int64_t D, bool backward) {
    const int64_t L = round_up(length, 16), R = L < kBlockRows ? L : kBlockRows;
    q = arena.take<C>(R * D);
    k = arena.take<C>(L * D);
    kt = arena.take<C>(L * D);
    v = arena.take<C>(L * D);
    p = arena.take<C>(R * L);
    out = arena.take<C>(R * D);
    draws = arena.take<uint16_t>(R * (L + 16) + 64);
    if (backward) {
      vt = arena.take<C>(L * D);
      dout = arena.take<C>(R * D);
      dp = arena.take<C>(R * L);
      dk = arena.take<C>(L * D);
      dv = arena.take<C>(L * D);
    }
  }
};

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class C>
inline Vec<C> lanes_from(int64_t first) {
  Vec<C> x;
  for (int i = 0; i < Simd<C>::N; ++i) x[i] = (C)i;
  return x + (C)first;
}

template <class T, class C>
void forward_task(const AttentionForward& args, int64_t sequence, int64_t head, char* scratch) {
  constexpr int W = Simd<C>::N;
  const AttentionShape& shape = args.shape;
  const int64_t begin = shape.cu_seqlens[sequence], L = shape.cu_seqlens[sequence + 1] - begin,
                D = shape.head_dim;
  if (L <= 0) return;
  const int64_t Lp = round_up(L, W), L4 = round_up(L, 4);
  Arena arena{scratch};
  Buffers<C> b(arena, L, D, false);
  gather<T, C>(b.k, args.k, begin, L, Lp, head, D, C(1));
  transpose(b.kt, Lp, b.k, Lp, D);
  gather<T, C>(b.v, args.v, begin, L, L4, head, D, C(1));
  C* lse = (C*)args.lse + head * shape.total + begin;
  const C keep_scale = C(65536.0 / (65536.0 - shape.threshold));
  const typename Mask<C>::I last = lanes_from<C>(Lp - W) < C(L);
  for (int64_t r = 0; r < L; r += kBlockRows) {
    const int64_t rows = L - r < kBlockRows ? L - r : kBlockRows, M = round_up(rows, 4);
    gather<T, C>(b.q, args.q, begin + r, rows, M, head, D, C(shape.softmax_scale * kLog2E));
    matmul<C, false>(M, Lp, D, b.q, D, b.kt, Lp, b.p, Lp, false);
    int64_t ld = 0;
    if (shape.threshold) ld = draw(b.draws, shape.seed, head, begin + r, rows, L);
    for (int64_t i = 0; i < rows; ++i) {
      C* row = b.p + i * Lp;
      Vec<C>* end = (Vec<C>*)(row + Lp - W);
      *end = last ? *end : splat(C(-__builtin_huge_val()));
      Vec<C> top = *end;
      for (Vec<C>* x = (Vec<C>*)row; x < end; ++x) top = *x > top ? *x : top;
      const C most = maximum<C>(top);
      Vec<C> total = Vec<C>{};
      for (Vec<C>* x = (Vec<C>*)row; x < end; ++x) total += * x = power2(*x - most);
      *end = last ? power2(*end - most) : Vec<C>{};
      const C weight = sum<C>(total + *end);
      lse[r + i] = (most + log_2(weight)) * C(kLn2);
      C factor = C(1) / weight;
      if (shape.threshold) {
        const uint16_t* draws = b.draws + i * ld;
        factor *= keep_scale;
        for (int64_t j = 0; j < Lp; j += W) {
          Vec<C>& x = *(Vec<C>*)(row + j);
          x = kept<C>(draws + j, shape.threshold) ? x * factor : Vec<C>{};
        }
      } else {
        for (int64_t j = 0; j < Lp; j += W) *(Vec<C>*)(row + j) *= factor;
      }
    }
    matmul<C, false>(M, D, L, b.p, Lp, b.v, D, b.out, D, false);
    scatter<T, C>(args.out, b.out, begin + r, rows, head, D, C(1));
  }
}

template <class T, class C>
void backward_task(const AttentionBackward& args, int64_t sequence, int64_t head, char* scratch) {
  constexpr int W = Simd<C>::N;
  const AttentionShape& shape = args.shape;
  const int64_t begin = shape.cu_seqlens[sequence], L = shape.cu_seqlens[sequence + 1] - begin,
                D = shape.head_dim;
  if (L <= 0) return;
  const int64_t Lp = round_up(L, W), L4 = round_up(L, 4);
  Arena arena{scratch};
  Buffers<C> b(arena, L, D, true);
  gather<T, C>(b.k, args.k, begin, L, Lp, head, D, C(1));
  transpose(b.kt, Lp, b.k, Lp, D);
  gather<T, C>(b.v, args.v, begin, L, Lp, head, D, C(1));
  transpose(b.vt, Lp, b.v, Lp, D);
  const C* lse = (const C*)args.lse + head * shape.total + begin;
  const C keep_scale = C(65536.0 / (65536.0 - shape.threshold));
  const typename Mask<C>::I last = lanes_from<C>(Lp - W) < C(L);
  for (int64_t r = 0; r < L; r += kBlockRows) {
    const int64_t rows = L - r < kBlockRows ? L - r : kBlockRows, M = round_up(rows, 4);
    gather<T, C>(b.q, args.q, begin + r, rows, M, head, D, C(shape.softmax_scale * kLog2E));
    gather<T, C>(b.dout, args.dout, begin + r, rows, M, head, D, C(1));
    matmul<C, false>(M, Lp, D, b.q, D, b.kt, Lp, b.p, Lp, false);
    matmul<C, false>(M, Lp, D, b.dout, D, b.vt, Lp, b.dp, Lp, false);
    int64_t ld = 0;
    if (shape.threshold) ld = draw(b.draws, shape.seed, head, begin + r, rows, L);
    for (int64_t i = 0; i < rows; ++i) {
      C *p = b.p + i * Lp, *dp = b.dp + i * Lp;
      const uint16_t* draws = b.draws + i * ld;
      const C high = lse[r + i] * C(kLog2E), low = C(lse[r + i] * kLog2E - high);  // change of base, exact
      Vec<C> dot = Vec<C>{};
      for (int64_t j = 0; j < Lp; j += W) {
        Vec<C>&x = *(Vec<C>*)(p + j), &dx = *(Vec<C>*)(dp + j);
        x = power2((x - high) - low);
        if (j == Lp - W) x = last ? x : Vec<C>{};
        if (shape.threshold) dx = kept<C>(draws + j, shape.threshold) ? dx * keep_scale : Vec<C>{};
        dot += x * dx;
      }
      const C delta = sum<C>(dot);
      for (int64_t j = 0; j < Lp; j += W) {
        Vec<C>&x = *(Vec<C>*)(p + j), &dx = *(Vec<C>*)(dp + j);
        dx = x * (dx - delta);
        if (shape.threshold) x = kept<C>(draws + j, shape.threshold) ? x * keep_scale : Vec<C>{};
      }
    }
    matmul<C, true>(L4, D, rows, b.p, Lp, b.dout, D, b.dv, D, r > 0);
    matmul<C, true>(L4, D, rows, b.dp, Lp, b.q, D, b.dk, D, r > 0);
    matmul<C, false>(M, D, L, b.dp, Lp, b.k, D, b.out, D, false);
    scatter<T, C>(args.dq, b.out, begin + r, rows, head, D, C(shape.softmax_scale));
  }
  scatter<T, C>(args.dk, b.dk, begin, L, head, D, C(kLn2));  // q carried scale * log2(e)
  scatter<T, C>(args.dv, b.dv, begin, L, head, D, C(1));
}

// ---- one query a sequence
// ------------------------------------------------------------------------------------

template <class T, class C>
inline C dot(const T* x, const C* y, int64_t D) {
  constexpr int W = Simd<C>::N;
  Vec<C> total = Vec<C>{};
  for (int64_t d = 0; d < D; d += W) total += load(x + d) * *(const Vec<C>*)(y + d);
  return sum<C>(total);
}

template <class T, class C>
inline void add_scaled(C* y, const T* x, C factor, int64_t D) {
  for (int64_t d = 0; d < D; d += Simd<C>::N) *(Vec<C>*)(y + d) += load(x + d) * factor;
}

template <class T, class C>
inline void write_scaled(T* y, const C* x, C factor, int64_t D) {
  for (int64_t d = 0; d < D; d += Simd<C>::N) store(y + d, *(const Vec<C>*)(x + d) * factor);
}

template <class T, class C>
void forward_cls_task(const AttentionForward& args, int64_t sequence, int64_t head, char* scratch) {
  constexpr int W = Simd<C>::N;
  const AttentionShape& shape = args.shape;
  const int64_t begin = shape.cu_seqlens[sequence], L = shape.cu_seqlens[sequence + 1] - begin,
                D = shape.head_dim;
  Arena arena{scratch};
  Buffers<C> b(arena, L, D, false);
  for (int64_t d = 0; d < D; d += W) *(Vec<C>*)(b.out + d) = Vec<C>{};
  C& lse = ((C*)args.lse)[head * shape.sequences + sequence];
  lse = C(-__builtin_huge_val());
  if (L > 0) {
    const int64_t Lp = round_up(L, W);
    gather<T, C>(b.q, args.q, sequence, 1, 1, head, D, C(shape.softmax_scale * kLog2E));
    C most = -C(__builtin_huge_val());
    for (int64_t j = 0; j < Lp; ++j) {
      b.p[j] = j < L ? dot(row_of<T>(args.k, begin + j, head), b.q, D) : -C(__builtin_huge_val());
      most = b.p[j] > most ? b.p[j] : most;
    }
    Vec<C> total = Vec<C>{};
    const typename Mask<C>::I last = lanes_from<C>(Lp - W) < C(L);
    for (int64_t j = 0; j < Lp; j += W) {
      Vec<C>& x = *(Vec<C>*)(b.p + j);
      x = power2(x - most);
      if (j == Lp - W) x = last ? x : Vec<C>{};
      total += x;
    }
    const C weight = sum<C>(total);
    lse = (most + log_2(weight)) * C(kLn2);
    const C factor = C(65536.0 / (65536.0 - shape.threshold)) / weight;
    if (shape.threshold) draw(b.draws, shape.seed, head, begin, 1, L);
    for (int64_t j = 0; j < L; ++j)
      if (shape.threshold == 0 || b.draws[j] >= shape.threshold)
        add_scaled(b.out, row_of<T>(args.v, begin + j, head), b.p[j] * factor, D);
  }
  write_scaled(row_of_mutable<T>(args.out, sequence, head), b.out, C(1), D);
}

template <class T, class C>
void backward_cls_task(const AttentionBackward& args, int64_t sequence, int64_t head, char* scratch) {
  constexpr int W = Simd<C>::N;
  const AttentionShape& shape = args.shape;
  const int64_t begin = shape.cu_seqlens[sequence], L = shape.cu_seqlens[sequence + 1] - begin,
                D = shape.head_dim;
  Arena arena{scratch};
  Buffers<C> b(arena, L, D, true);
  for (int64_t d = 0; d < D; d += W) *(Vec<C>*)(b.out + d) = Vec<C>{};
  if (L > 0) {
    const int64_t Lp = round_up(L, W);
    gather<T, C>(b.q, args.q, sequence, 1, 1, head, D, C(shape.softmax_scale * kLog2E));
    gather<T, C>(b.dout, args.dout, sequence, 1, 1, head, D, C(1));
    const C natural = ((const C*)args.lse)[head * shape.sequences + sequence];
    const C high = natural * C(kLog2E), low = C(natural * kLog2E - high);  // change of base, exact
    const C keep_scale = C(65536.0 / (65536.0 - shape.threshold));
    if (shape.threshold) draw(b.draws, shape.seed, head, begin, 1, L);
    for (int64_t j = 0; j < Lp; ++j) b.p[j] = j < L ? dot(row_of<T>(args.k, begin + j, head), b.q, D) : high;
    for (int64_t j = 0; j < Lp; j += W) *(Vec<C>*)(b.p + j) = power2((*(Vec<C>*)(b.p + j) - high) - low);
    C delta = C(0);
    for (int64_t j = 0; j < L; ++j) {
      const bool keep = shape.threshold == 0 || b.draws[j] >= shape.threshold;
      b.dp[j] = keep ? dot(row_of<T>(args.v, begin + j, head), b.dout, D) * keep_scale : C(0);
      delta += b.p[j] * b.dp[j];
      write_scaled(row_of_mutable<T>(args.dv, begin + j, head), b.dout, keep ? b.p[j] * keep_scale : C(0), D);
    }
    for (int64_t j = 0; j < L; ++j) {
      const C ds = b.p[j] * (b.dp[j] - delta);
      add_scaled(b.out, row_of<T>(args.k, begin + j, head), ds, D);
      write_scaled(row_of_mutable<T>(args.dk, begin + j, head), b.q, ds * C(kLn2), D);
    }
  }
  write_scaled(row_of_mutable<T>(args.dq, sequence, head), b.out, C(shape.softmax_scale), D);
}

// ---- by element type
// -----------------------------------------------------------------------------------------

inline int64_t scratch_bytes(int64_t longest, int64_t D, bool backward) {
  Arena arena{nullptr};
  Buffers<double> measure(arena, longest, D, backward);
  return arena.used;
}

void forward(const AttentionForward& args, bool cls, int64_t sequence, int64_t head, char* scratch) {
  switch (args.shape.dtype) {
    case AttentionDtype::kBFloat16:
      return cls ? forward_cls_task<Bf16, float>(args, sequence, head, scratch)
                 : forward_task<Bf16, float>(args, sequence, head, scratch);
    case AttentionDtype::kHalf:
      return cls ? forward_cls_task<Half, float>(args, sequence, head, scratch)
                 : forward_task<Half, float>(args, sequence, head, scratch);
    case AttentionDtype::kFloat:
      return cls ? forward_cls_task<float, float>(args, sequence, head, scratch)
                 : forward_task<float, float>(args, sequence, head, scratch);
    case AttentionDtype::kDouble:
      return cls ? forward_cls_task<double, double>(args, sequence, head, scratch)
                 : forward_task<double, double>(args, sequence, head, scratch);
  }
}

void backward(const AttentionBackward& args, bool cls, int64_t sequence, int64_t head, char* scratch) {
  switch (args.shape.dtype) {
    case AttentionDtype::kBFloat16:
      return cls ? backward_cls_task<Bf16, float>(args, sequence, head, scratch)
                 : backward_task<Bf16, float>(args, sequence, head, scratch);
    case AttentionDtype::kHalf:
      return cls ? backward_cls_task<Half, float>(args, sequence, head, scratch)
                 : backward_task<Half, float>(args, sequence, head, scratch);
    case AttentionDtype::kFloat:
      return cls ? backward_cls_task<float, float>(args, sequence, head, scratch)
                 : backward_task<float, float>(args, sequence, head, scratch);
    case AttentionDtype::kDouble:
      return cls ? backward_cls_task<double, double>(args, sequence, head, scratch)
                 : backward_task<double, double>(args, sequence, head, scratch);
  }
}
