// GELU by lanes; see gelu.h.
#pragma once
#include "gelu.h"
#include "simd_isa.h"

namespace mtfast::gelu {

using namespace simd;

// Of the standard normal distribution, at each lane's x.
template <class V>
struct Normal {
  V cdf, density;

  MTFAST_INLINE V value(const Normal& at, V x) { return x * at.cdf; }
  MTFAST_INLINE V slope(const Normal& at, V x) { return at.cdf + x * at.density; }
};

// 2^x for x <= 0 to 16 bits, 0 below -127; NaN stays NaN once multiplied by itself.
template <Isa isa>
MTFAST_INLINE f32x16 exp2_to_16_bits(f32x16 x) {
  const f32x16 least = splat<f32x16>(-127);  // where what follows gives 0 exactly
  x = select<isa, Less>(x, least, least, x);
  const f32x16 shifted = x + 12582912.0f;  // as in simd.h
  const f32x16 f = x - (shifted - 12582912.0f);
  f32x16 y = f * 9.58285201e-3f + 5.59064262e-2f;
  y = y * f + 2.40240991e-1f;
  y = y * f + 6.93124175e-1f;
  y = y * f + 1.0f;
  return reinterpret_cast<f32x16>(reinterpret_cast<u32x16>(y) + (reinterpret_cast<u32x16>(shifted) << 23));
}

// As exactly as T, the storage type of x, can tell.
template <Isa isa, class T, class V>
MTFAST_INLINE Normal<V> normal(V x) {
  if constexpr (sizeof(V) == sizeof(f64x16)) {
    const V density = exp(x * x * splat<V>(-0.5)) * splat<V>(0.39894228040143268);
    return {splat<V>(0.5) * (splat<V>(1) + erf(x * splat<V>(0.70710678118654752))), density};
  } else {
    constexpr bool kTo16Bits = sizeof(T) == 2;
    const V end = splat<V>(kEnd), power = x * kToBase2 * x;
    V a = reinterpret_cast<V>(reinterpret_cast<u32x16>(x) & 0x7fffffffu), e;
    a = select<isa, Less>(end, a, end, a);
    if constexpr (kTo16Bits)
      e = exp2_to_16_bits<isa>(power);
    else
      e = exp2(power);
    const V tail = e * scaled_tail<kTo16Bits>(a);
    return {select<isa, Less>(x, V{}, tail, 1.0f - tail), e * kDensityAtZero};
  }
}

}  // namespace mtfast::gelu
