// Sixteen lanes of float for the CPU implementations, in the compiler's vector extensions: one source for
// every machine, widened where a function that inlines it is compiled for a wider instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dtype.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call: everything here is inlined

#define MTFAST_INLINE static inline __attribute__((always_inline))
#define MTFAST_INLINE_LAMBDA __attribute__((always_inline))  // between its parameters and its body

namespace mtfast::simd {

constexpr int kLanes = 16;
typedef float f32x16 __attribute__((vector_size(64)));
typedef double f64x16 __attribute__((vector_size(128)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef int64_t i64x16 __attribute__((vector_size(128)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint64_t u64x16 __attribute__((vector_size(128)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// f(a value of the storage type).
template <class F>
void for_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kFloat64:
      return f(double{});
    case Dtype::kBFloat16:
      return f(bf16{});
    case Dtype::kFloat16:
      return f(f16{});
  }
}

// The vector a storage type is computed in.
template <class T>
struct Compute {
  using scalar = float;
  using vec = f32x16;
  using mask = i32x16;
};
template <>
struct Compute<double> {
  using scalar = double;
  using vec = f64x16;
  using mask = i64x16;
};

template <class V>
MTFAST_INLINE V splat(double x) {
  using S = std::decay_t<decltype(V{}[0])>;
  return V{} + static_cast<S>(x);
}

// ---- sixteen stored elements to and from a vector of lanes ----

MTFAST_INLINE f32x16 unpack(const bf16* p) {
  u16x16 h;
  std::memcpy(&h, p, sizeof h);
  return reinterpret_cast<f32x16>(__builtin_convertvector(h, u32x16) << 16);
}

MTFAST_INLINE f32x16 unpack(const f16* p) {
  u16x16 h;
  std::memcpy(&h, p, sizeof h);
  const u32x16 w = __builtin_convertvector(h, u32x16);
  // exponent rebiased by one multiplication, which also normalises denormals; Inf and NaN keep a full
  // exponent
  u32x16 magnitude = (w & 0x7fffu) << 13;
  const u32x16 full = (u32x16)((w & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  magnitude = reinterpret_cast<u32x16>(reinterpret_cast<f32x16>(magnitude) * 0x1p112f) | full;
  return reinterpret_cast<f32x16>(magnitude | ((w & 0x8000u) << 16));
}

MTFAST_INLINE f32x16 unpack(const float* p) {
  f32x16 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

MTFAST_INLINE f64x16 unpack(const double* p) {
  f64x16 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

MTFAST_INLINE void pack(bf16* p, f32x16 x) {  // round to nearest, ties to even; NaN stays NaN
  const u32x16 w = reinterpret_cast<u32x16>(x);
  const u32x16 rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  const u16x16 h = __builtin_convertvector((x == x) ? rounded : u32x16{} + 0x7fc0u, u16x16);
  std::memcpy(p, &h, sizeof h);
}

MTFAST_INLINE void pack(f16* p, f32x16 x) {
  const u32x16 w = reinterpret_cast<u32x16>(x), sign = (w >> 16) & 0x8000u, a = w & 0x7fffffffu;
  const u32x16 normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // adding 1/2 leaves a value below 2^-14 rounded to a multiple of 2^-24 in the low bits
  const u32x16 tiny = reinterpret_cast<u32x16>(reinterpret_cast<f32x16>(a) + 0.5f) - 0x3f000000u;
  u32x16 h = (a < 0x38800000u) ? tiny : normal;
  h = (a >= 0x477ff000u) ? u32x16{} + 0x7c00u : h;
  h = (a > 0x7f800000u) ? u32x16{} + 0x7e00u : h;
  const u16x16 out = __builtin_convertvector(h | sign, u16x16);
  std::memcpy(p, &out, sizeof out);
}

MTFAST_INLINE void pack(float* p, f32x16 x) { std::memcpy(p, &x, sizeof x); }
MTFAST_INLINE void pack(double* p, f64x16 x) { std::memcpy(p, &x, sizeof x); }

// The same at the end of a row, where only `count` elements are there; lanes beyond it read 0.
template <class T>
MTFAST_INLINE auto load(const T* p, int64_t count) {
  if (count >= kLanes) return unpack(p);
  T tail[kLanes] = {};
  std::memcpy(tail, p, static_cast<size_t>(count) * sizeof(T));
  return unpack(tail);
}

template <class T, class V>
MTFAST_INLINE void store(T* p, V x, int64_t count) {
  if (count >= kLanes) return pack(p, x);
  T tail[kLanes];
  pack(tail, x);
  std::memcpy(p, tail, static_cast<size_t>(count) * sizeof(T));
}

// Over the lanes, by halves: the compiler keeps each half in registers.
template <class V>
MTFAST_INLINE auto sum(V x) {
  std::decay_t<decltype(x[0])> lanes[kLanes];
  std::memcpy(lanes, &x, sizeof x);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  return lanes[0];
}

template <class V>
MTFAST_INLINE auto maximum(V x) {
  std::decay_t<decltype(x[0])> lanes[kLanes];
  std::memcpy(lanes, &x, sizeof x);
  for (int n = kLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] = lanes[i] > lanes[i + n] ? lanes[i] : lanes[i + n];
  return lanes[0];
}

// One stage of a transpose in registers: exchanges the off-diagonal S x S blocks of each 2S x 2S block.
template <int S>
MTFAST_INLINE void exchange(f32x16 (&x)[kLanes]) {
  i32x16 low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    low[i] = (i & S) ? kLanes + i - S : i;
    high[i] = (i & S) ? kLanes + i : i + S;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & S) continue;
    const f32x16 a = x[i], b = x[i + S];
    x[i] = __builtin_shuffle(a, b, low);
    x[i + S] = __builtin_shuffle(a, b, high);
  }
}

// x[i][j] and x[j][i] change places.
MTFAST_INLINE void transpose16(f32x16 (&x)[kLanes]) {
  exchange<1>(x);
  exchange<2>(x);
  exchange<4>(x);
  exchange<8>(x);
}

// ---- exp2, exp (saturating at 88.3), erf and tanh: within 2 units in the last place of float ----

// For x from -127, where it is 0 exactly, to below 127: x = n + f with |f| <= 1/2, Taylor series of 2^f, n
// into the exponent.
MTFAST_INLINE f32x16 exp2_in_range(f32x16 x) {
  const f32x16 shifted = x + 12582912.0f;  // 1.5 * 2^23: the low bits now hold round(x)
  const f32x16 f = x - (shifted - 12582912.0f);
  f32x16 y = f * 1.5252733804e-5f + 1.5403530393e-4f;
  y = y * f + 1.3333558146e-3f;
  y = y * f + 9.6181291076e-3f;
  y = y * f + 5.5504108665e-2f;
  y = y * f + 2.4022650696e-1f;
  y = y * f + 6.9314718056e-1f;
  y = y * f + 1.0f;
  return reinterpret_cast<f32x16>(reinterpret_cast<u32x16>(y) + (reinterpret_cast<u32x16>(shifted) << 23));
}

// For x below 127, 0 below -126.
MTFAST_INLINE f32x16 exp2(f32x16 x) {
  return (x >= -126.0f) ? exp2_in_range(x) : (x < -126.0f) ? f32x16{} : x;
}

MTFAST_INLINE f32x16 exp(f32x16 x) {
  const f32x16 low = splat<f32x16>(-87.3), high = splat<f32x16>(88.3);
  const f32x16 clamped = (x < low) ? low : (x > high) ? high : x;
  const f32x16 shifted = clamped * 1.44269504f + 12582912.0f;  // rounds to an integer in the low bits
  const f32x16 n = shifted - 12582912.0f;
  const f32x16 r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  f32x16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const u32x16 scale = (reinterpret_cast<u32x16>(shifted) + 127u) << 23;
  const f32x16 y = p * reinterpret_cast<f32x16>(scale);
  return (x < low) ? f32x16{} : (x == x) ? y : x;
}

MTFAST_INLINE f32x16 erf(f32x16 x) {
  const f32x16 t = (x < 0.0f) ? -x : x, s = x * x;
  f32x16 far = (t * -1.72853470e-5f + 3.83197126e-4f) * s + (t * -3.88396438e-3f + 2.42546219e-2f);
  far = far * t + -1.06777877e-1f;
  far = far * t + -6.34846687e-1f;
  far = far * t + -1.28717512e-1f;
  far = 1.0f - exp(far * t - t);
  f32x16 near = s * -5.96761703e-4f + 4.99119423e-3f;
  near = near * s + -2.67681349e-2f;
  near = near * s + 1.12819925e-1f;
  near = near * s + -3.76125336e-1f;
  near = near * s + 1.28379166e-1f;
  near = near * x + x;
  return (t > 0.927734375f) ? ((x < 0.0f) ? -far : far) : near;
}

MTFAST_INLINE f32x16 tanh(f32x16 x) {
  const f32x16 t = (x < 0.0f) ? -x : x, s = x * x;
  const f32x16 far = 1.0f - 2.0f / (exp(2.0f * t) + 1.0f);
  f32x16 near = s * -5.70498872745e-3f + 2.06390887954e-2f;
  near = near * s + -5.37397155531e-2f;
  near = near * s + 1.33314422036e-1f;
  near = near * s + -3.33332819422e-1f;
  near = near * s * x + x;
  return (t > 0.625f) ? ((x < 0.0f) ? -far : far) : near;
}

MTFAST_INLINE f64x16 by_lanes(double (*f)(double), f64x16 x) {
  for (int i = 0; i < kLanes; ++i) x[i] = f(x[i]);
  return x;
}
MTFAST_INLINE f64x16 exp2(f64x16 x) { return by_lanes(std::exp2, x); }
MTFAST_INLINE f64x16 exp(f64x16 x) { return by_lanes(std::exp, x); }
MTFAST_INLINE f64x16 erf(f64x16 x) { return by_lanes(std::erf, x); }
MTFAST_INLINE f64x16 tanh(f64x16 x) { return by_lanes(std::tanh, x); }

}  // namespace mtfast::simd
