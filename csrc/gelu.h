// GELU from one exponential, the same numbers for the lanes of a CPU and the threads of a GPU.
//
// With e(x) = exp(-x^2 / 2) and R(a) = Phi(-a) / e(a), which falls smoothly from 1/2 (Mills' ratio over
// sqrt(2 pi)):
//
//   Phi(x) = 1 - e(x) R(x) for x >= 0, e(x) R(-x) below;   gelu(x) = x Phi(x),  gelu'(x) = Phi(x) + x phi(x)
//
// with phi(x) = e(x) / sqrt(2 pi). Nothing cancels below 0, where 1 + erf(x / sqrt(2)) has no digits left.
#pragma once
#include "device/philox.cuh"

#ifndef __CUDACC__
#pragma GCC diagnostic ignored "-Wpsabi"  // as in simd.h
#endif

namespace mtfast::gelu {

constexpr float kEnd = 5;                               // R beyond is taken for R(5): Phi(-5) is 3e-7
constexpr float kToBase2 = -0.72134752f;                // e(x) = 2^(kToBase2 * x^2)
constexpr double kDensityAtZero = 0.39894228040143268;  // 1 / sqrt(2 pi)

// R(a) for a in [0, kEnd], a float or lanes of them. For 16 bits within 9e-5 of itself up to a = 4 and 2e-3
// beyond; else times e(a), which is what counts, within 4e-8. Minimax fits.
template <bool kTo16Bits, class V>
MTFAST_HOST_DEVICE V scaled_tail(V a) {
  if constexpr (kTo16Bits) {
    V r = a * 7.38850258e-6f - 1.75842433e-4f;
    r = r * a + 1.8203049e-3f;
    r = r * a - 1.08840112e-2f;
    r = r * a + 4.24336381e-2f;
    r = r * a - 1.16861179e-1f;
    r = r * a + 2.4295491e-1f;
    r = r * a - 3.97666812e-1f;
    return r * a + 4.99958545e-1f;
  } else {
    V r = a * 3.8619838e-8f - 1.15276589e-6f;
    r = r * a + 1.55159505e-5f;
    r = r * a - 1.25887105e-4f;
    r = r * a + 6.98643038e-4f;
    r = r * a - 2.87784031e-3f;
    r = r * a + 9.40606371e-3f;
    r = r * a - 2.58356594e-2f;
    r = r * a + 6.21291175e-2f;
    r = r * a - 1.32872969e-1f;
    r = r * a + 2.49983773e-1f;
    r = r * a - 3.98941338e-1f;
    return r * a + 0.5f;
  }
}

}  // namespace mtfast::gelu
