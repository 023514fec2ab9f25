// GELU by lanes; see gelu.h.
#pragma once
#include "gelu.h"
#include "simd_isa.h"

namespace mtfast::gelu {

using namespace simd;

// ---- bfloat16 on AVX-512: a table of pieces, within 2e-3 of what they stand for up to a = 4 ----

// A function of a >= 0 by quadratics in a: piece k is about k / kPerUnit, the last one 0. There are as many
// as two registers have lanes, so that each lane picks a coefficient of its own in one instruction.
struct Pieces {
  alignas(64) float coefficient[3][2 * kLanes] = {};
};
constexpr float kPerUnit = 16.0f / 3;
constexpr int kLastPiece = 2 * kLanes - 1;
constexpr float kEndOfPieces = kLastPiece / kPerUnit;

template <class F>
Pieces pieces_of(F f) {
  Pieces pieces;
  for (int k = 0; k < kLastPiece; ++k) {  // through the three Chebyshev points of each, expanded about 0
    const double at = k / double{kPerUnit}, step = std::sqrt(0.75) / 2 / kPerUnit;
    const double bend = (f(at + step) - 2 * f(at) + f(at - step)) / (2 * step * step);
    const double slope = (f(at + step) - f(at - step)) / (2 * step) - 2 * bend * at;
    pieces.coefficient[0][k] = static_cast<float>(f(at) - (slope + bend * at) * at);
    pieces.coefficient[1][k] = static_cast<float>(slope);
    pieces.coefficient[2][k] = static_cast<float>(bend);
  }
  return pieces;
}

inline double tail(double a) { return 0.5 * std::erfc(a * std::sqrt(0.5)); }
inline double slope_tail(double a) { return tail(a) - a * std::exp(-0.5 * a * a) * kDensityAtZero; }
inline const Pieces kTailPieces = pieces_of(tail), kSlopeTailPieces = pieces_of(slope_tail);

// ---- any precision ----

// gelu and its derivative, as exactly as T, the storage type, can tell. To be made outside a loop, which then
// keeps in registers what it needs of it.
template <Isa isa, class T>
class Gelu {
  using V = typename Compute<T>::vec;
  static constexpr bool kTo16Bits = sizeof(T) == 2, kByPieces = std::is_same_v<T, bf16> && is_avx512(isa);
  Pieces tail_ = kTailPieces, slope_tail_ = kSlopeTailPieces;

 public:
  MTFAST_INLINE V value(const Gelu& gelu, V x) {
    if constexpr (kByPieces) {  // max(x, 0) - |x| tail(|x|), and NaN of -Inf as 0 * x is
      const V a = size_of(x, kEndOfPieces);
      return select<isa, Less>(x, V{}, V{} * x, x) - a * by_pieces(gelu.tail_, a);
    } else {
      return x * cdf(x, exponential(x));
    }
  }

  MTFAST_INLINE V slope(const Gelu& gelu, V x) {
    if constexpr (kByPieces) return mirrored(x, by_pieces(gelu.slope_tail_, size_of(x, kEndOfPieces)));
    const V e = exponential(x);
    return cdf(x, e) + x * (e * splat<V>(kDensityAtZero));
  }

 private:
  // From what it is at -|x|, a function f with f(-x) = 1 - f(x). AVX-512 subtracts by a mask, the difference
  // being asked for first.
  MTFAST_INLINE V mirrored(V x, V at_minus) {
    return select<isa, LessEqual>(V{}, x, splat<V>(1) - at_minus, at_minus);
  }

  // |x|, but at most `most`; NaN stays NaN.
  MTFAST_INLINE f32x16 size_of(f32x16 x, float most) {
    const f32x16 a = reinterpret_cast<f32x16>(reinterpret_cast<u32x16>(x) & 0x7fffffffu),
                 end = f32x16{} + most;
    return select<isa, Less>(end, a, end, a);
  }

  MTFAST_INLINE f32x16 by_pieces(const Pieces& pieces, f32x16 a) {
    const f32x16 rounded = a * kPerUnit + 12582912.0f;  // 1.5 * 2^23: an integer in the low bits
    f32x16 picked[3];
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i)
      picked[i] = __builtin_shuffle(unpack(pieces.coefficient[i]), unpack(pieces.coefficient[i] + kLanes),
                                    reinterpret_cast<i32x16>(rounded));
    return (picked[2] * a + picked[1]) * a + picked[0];
  }

  // e(x) of gelu.h.
  MTFAST_INLINE f32x16 exponential(f32x16 x) {
    const f32x16 power = x * kToBase2 * x, least = f32x16{} - 127.0f;
    return exp2_in_range(select<isa, Less>(power, least, least, power));
  }
  MTFAST_INLINE f64x16 exponential(f64x16 x) { return exp(x * x * -0.5); }

  MTFAST_INLINE f32x16 cdf(f32x16 x, f32x16 e) {
    return mirrored(x, e * scaled_tail<kTo16Bits>(size_of(x, kEnd)));
  }
  MTFAST_INLINE f64x16 cdf(f64x16 x, f64x16) { return 0.5 + 0.5 * erf(x * 0.70710678118654752); }
};

}  // namespace mtfast::gelu
