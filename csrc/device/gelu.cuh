// GELU of one element; see gelu.h.
#pragma once
#include "../gelu.h"
#include "ptx.cuh"

namespace mtfast::gelu {

// gelu and its derivative at x, as exactly as 16 bits or float32 can tell.
template <bool kTo16Bits>
__device__ __forceinline__ void value_and_slope(float x, float& value, float& slope) {
  const float e = ptx::exp2_approx(x * kToBase2 * x), a = fabsf(x) > kEnd ? kEnd : fabsf(x);
  const float tail = e * scaled_tail<kTo16Bits>(a), cdf = x < 0.f ? tail : 1.f - tail;
  value = x * cdf;
  slope = cdf + x * (e * static_cast<float>(kDensityAtZero));
}

}  // namespace mtfast::gelu
