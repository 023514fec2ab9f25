// Reductions over lanes.
#pragma once
#include "runtime.cuh"

namespace mtfast {

// Sum over each aligned group of kLanes lanes, in all of them; the whole warp calls.
template <int kLanes = 32, class T>
__device__ __forceinline__ T warp_sum(T value) {
  if constexpr (kLanes > 1)
    return warp_sum<kLanes / 2>(value + __shfl_xor_sync(0xffffffffu, value, kLanes / 2));
  else
    return value;
}

template <int kLanes = 32, class T>
__device__ __forceinline__ T warp_max(T value) {
  MTFAST_UNROLL
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, value, step);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace mtfast
