// Element types of the kernels under one name for each thing that is done with them.
#pragma once
#include <type_traits>

#include "ptx.cuh"

namespace mtfast {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void round_to(float& to, float x) { to = x; }
__device__ __forceinline__ void round_to(__nv_bfloat16& to, float x) { to = __float2bfloat16(x); }
__device__ __forceinline__ void round_to(__half& to, float x) { to = __float2half(x); }

// Two neighbouring 16-bit elements as they lie in memory.
template <class T>
__device__ __forceinline__ uint32_t pair_bits(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}

// c += a b on tensor cores; fragments as in ptx.cuh.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>)
    ptx::mma_fp16(c, a, b0, b1);
  else
    ptx::mma_bf16(c, a, b0, b1);
}

}  // namespace mtfast
